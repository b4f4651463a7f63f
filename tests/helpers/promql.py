"""The PromQL expressions that we ship, in alert and recording rules and in dashboards."""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import promql_parser
import yaml
from promql_parser import MatchOp, VectorSelector

from tests.helpers.paths import ROOT

FILES = ROOT / "deploy" / "helm" / "files"
RULES = tuple(sorted((FILES / "rules").glob("*.yml")))
DASHBOARDS = tuple(sorted((FILES / "dashboards").glob("*.json")))

# Values of Grafana's variables: its own, and the defaults of ours.
GRAFANA = {"$__rate_interval": "1m", "$__range": "1h", "$namespace": ".*"}


class Expression(NamedTuple):
    """A PromQL expression and its place."""

    place: str
    text: str

    def selectors(self) -> list[VectorSelector]:
        """All selectors of series in the expression."""
        found: list[VectorSelector] = []

        def visit(node: Any) -> bool:
            if isinstance(node, VectorSelector):
                found.append(node)
            return True

        promql_parser.walk(promql_parser.parse(self.text), visit)
        return found


def rules() -> Iterator[dict[str, Any]]:
    """Every rule as a dictionary with ``record`` or ``alert``, ``expr``, …"""
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from group["rules"]


def recorded() -> set[str]:
    """Names of the series that the recording rules create."""
    return {rule["record"] for rule in rules() if "record" in rule}


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name of the dashboard's file, panel) of every panel that shows data."""
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            if panel["type"] != "row":
                yield path.stem, panel


def panel_expressions() -> list[Expression]:
    """The queries of all panels, with Grafana's variables replaced by their defaults."""
    found = []
    for dashboard, panel in panels():
        for target in panel["targets"]:
            text = target["expr"]
            for variable, value in (GRAFANA | constants(dashboard)).items():
                text = text.replace(variable, value)
            found.append(Expression(f"{dashboard}: {panel['title']}", text))
    return found


def constants(dashboard: str) -> dict[str, str]:
    """Defaults of a dashboard's text boxes, by variable."""
    path = FILES / "dashboards" / f"{dashboard}.json"
    variables = json.loads(path.read_text())["templating"]["list"]
    return {f"${v['name']}": v["query"] for v in variables if v["type"] == "textbox"}


def rule_expressions() -> list[Expression]:
    return [Expression(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules()]


def existing(selector: VectorSelector) -> str:
    """The selector with every value of a label replaced by "there is such a label".

    The outcomes and reasons that occur are a matter of luck, but the series must have these labels.
    A matcher that also accepts an absent label asks for nothing.
    """
    matchers = [m.name for m in selector.matchers.matchers if not _takes_absence(m.op, m.value)]
    wanted = ", ".join(f'{name}!=""' for name in matchers)
    return f"{selector.name}{{{wanted}}}" if wanted else selector.name


def _takes_absence(op: MatchOp, value: str) -> bool:
    if op == MatchOp.Equal:
        return value == ""
    if op == MatchOp.NotEqual:
        return value != ""
    matches = re.fullmatch(value, "") is not None
    return matches if op == MatchOp.Re else not matches
