"""Dashboards, recording rules and alerts: they parse, name series that exist, and fire when they should."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from promql_parser import VectorSelector

import server.metrics  # noqa: F401  (registers the gateway's series)
from tests.helpers import promql
from tests.helpers.paths import ROOT

RULE_TESTS = Path(__file__).with_name("rules_test.yml")
RUNBOOK = ROOT / "docs" / "runbook.md"
FAMILIES = tuple(text_string_to_metric_families(generate_latest(REGISTRY).decode()))
SUFFIX = re.compile("_(bucket|sum|count|total)$")


def promtool(*arguments: str) -> str:
    assert shutil.which("promtool"), "these tests run promtool (Debian: prometheus)"
    result = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_rules_are_valid() -> None:
    promtool("check", "rules", *map(str, promql.RULES))


def test_rules_give_the_expected_values_and_alerts() -> None:
    promtool("test", "rules", str(RULE_TESTS))


def test_every_alert_is_seen_firing() -> None:
    tests = yaml.safe_load(RULE_TESTS.read_text())["tests"]
    cases = [case for test in tests for case in test.get("alert_rule_test", ())]
    fired = {case["alertname"] for case in cases if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in promql.rules() if "alert" in rule}


def test_every_alert_is_explained() -> None:
    sections = set(re.findall(r"^#+ (Wheels\w+)$", RUNBOOK.read_text(), re.MULTILINE))
    assert sections == {rule["alert"] for rule in promql.rules() if "alert" in rule}


def selectors() -> Iterator[tuple[str, VectorSelector]]:
    """The selectors of all rules and panels, each with its place."""
    for expression in promql.rule_expressions() + promql.panel_expressions():
        for selector in expression.selectors():
            yield expression.place, selector


def test_every_selected_series_exists() -> None:
    """Our series are in the gateway's registry, recorded ones in the rules. A real scrape has the others."""
    known = {family.name for family in FAMILIES}
    recorded = promql.recorded()
    for place, selector in selectors():
        if ":" in selector.name and not selector.name.startswith("vllm:"):
            assert selector.name in recorded, place
        elif selector.name.startswith("wheels_"):
            assert SUFFIX.sub("", selector.name) in known, place


def test_every_selected_label_has_a_known_value() -> None:
    """Every outcome, reason and source in a selector is named by the help of its series."""
    for place, selector in selectors():
        if "wheels_" not in selector.name:
            continue
        (about,) = (
            f.documentation for f in FAMILIES if f"{f.name}_" in selector.name.replace(":", "_") + "_"
        )
        for matcher in selector.matchers.matchers:
            if matcher.name in ("outcome", "reason", "source", "decision"):
                for value in matcher.value.split("|"):
                    assert re.search(rf"\b{value}\b", about), (place, selector.name, value)


def dropped(given: Any, parsed: Any, path: str = "") -> list[str]:
    """Fields of a document that are missing in the parsed document."""
    if isinstance(given, dict):
        return [
            name
            for key, value in given.items()
            for name in (dropped(value, parsed[key], f"{path}.{key}") if key in parsed else [f"{path}.{key}"])
        ]
    if isinstance(given, list):
        pairs = enumerate(zip(given, parsed, strict=True))
        return [name for i, (one, other) in pairs for name in dropped(one, other, f"{path}[{i}]")]
    return [] if given == parsed else [path]


@pytest.mark.parametrize("path", promql.DASHBOARDS, ids=lambda path: path.stem)
def test_grafana_knows_every_field(path: Path) -> None:
    """Grafana's own models of dashboards and panels keep every field."""
    register_default_plugins()
    given = json.loads(path.read_text())
    parsed = json.loads(JSONEncoder().encode(Dashboard.from_json(given)))
    assert not dropped(given, parsed)


def test_panels_are_complete() -> None:
    for dashboard, panel in promql.panels():
        assert panel["description"], f"{dashboard}: {panel['title']} says not what it shows"
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert target["expr"]


@pytest.mark.parametrize("path", promql.DASHBOARDS, ids=lambda path: path.stem)
def test_panels_do_not_overlap(path: Path) -> None:
    panels = json.loads(path.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in panels):
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        taken |= cells
