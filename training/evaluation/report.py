"""The report of `wheels evaluate`: quality against realised teacher rate by method, as JSON and a table."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from measuring.json_lines import DataError
from router.gate import CONFIDENCE_GATES
from router.gate_names import LEARNED
from training.evaluation.gateway import MeasuredGateway
from training.evaluation.scoring import Row
from training.gating.rollout import Rollout
from training.gating.tree import PERIODIC

BUDGETS = (0.05, 0.1, 0.2, 0.3, 0.5)
"""Fractions that calibrated gates are measured at."""
BINS = 10
SPENT = "learned, aim: rate"
"""Name of the learned gate with its spare prices, which aim at the rate."""
GATEWAY = "gateway"
SETTLED = "settled_rate"
"""Column that only the rows of gateways have."""
ERROR = "pgr_error"
"""Standard error of a PGR; reports of older versions have none."""
METHODS = (LEARNED, *CONFIDENCE_GATES, "oracle", "oracle_kl", PERIODIC, "query", "query_oracle", GATEWAY)
"""Names that no further router can have."""


COSTS = {"calls": "teacher calls", "runs": "runs of calls", "positions": "teacher positions"}


@dataclass(frozen=True)
class QualityReport:
    """How well each method of asking uses the teacher.

    A measured gateway is a method of its own, `gateway`. Its rows are under the bucket, in `curves` too. Its
    PGR refers to the gap between its own budgets 0 and 1. In a report of a gateway alone, all fields are of
    the gateway.
    """

    student: float
    """Quality of the student alone."""
    teacher: float
    """Quality of the teacher alone."""
    curves: dict[str, list[Row]]
    """By method, rows at several realised rates without a bucket; empty if curves were not measured.

    Calls have the router's `ask_tokens`, or K tokens if the method's name ends with `@K`.
    """
    area: dict[str, float]
    """Area below each curve of PGR over the rate."""
    calibration_mae: float
    """Mean |realised - requested| rate of the learned gate when it aims at the rate."""
    budgets: dict[str, list[Row]]
    """By gate, rows under the bucket at calibrated prices."""
    asked: list[float]
    """Share of the learned gate's calls (budget 0.1) in each tenth of the completion."""

    def to_json(self) -> str:
        """All fields, as one JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, directory: Path) -> "QualityReport":
        """The report of a gateway that `wheels evaluate --out` wrote in this directory.

        Raises:
            DataError: there is none, or no gateway was measured.
        """
        file = directory / "report.json"
        try:
            report = cls(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{file}: not a report of `wheels evaluate --out`: {error}") from error
        if GATEWAY not in report.budgets:
            raise DataError(f"{file}: not of a gateway: `wheels evaluate --gateway` had not been used")
        return report


def gateway_report(measured: MeasuredGateway) -> QualityReport:
    """The report of a gateway alone."""
    between = [row for row in measured.rows if 0 < row["budget"] < 1]
    example = min(range(len(measured.rows)), key=lambda i: abs(measured.rows[i]["budget"] - 0.1))
    return QualityReport(
        student=measured.student,
        teacher=measured.teacher,
        curves={GATEWAY: measured.rows},
        area={GATEWAY: area(rate_and_pgr(measured.rows))},
        calibration_mae=sum(map(missed, between)) / max(1, len(between)),
        budgets={GATEWAY: measured.rows},
        asked=where_asked(measured.completions[example]),
    )


def joined(report: QualityReport, other: QualityReport, name: str = GATEWAY) -> QualityReport:
    """The report, with the rows of the other report's gateway added under this name."""
    return replace(
        report,
        curves=report.curves | {name: other.curves[GATEWAY]},
        area=report.area | {name: other.area[GATEWAY]},
        budgets=report.budgets | {name: other.budgets[GATEWAY]},
    )


def column(rows: Sequence[Row], name: str) -> list[float]:
    """The value of this name in every row."""
    return [row[name] for row in rows]


def rate_and_pgr(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """The (rate, PGR) points of a curve."""
    return list(zip(column(rows, "rate"), column(rows, "pgr"), strict=True))


def missed(row: Row) -> float:
    """Absolute difference between a row's realised rate and its budget."""
    return abs(row["rate"] - row["budget"])


def anchored(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points in order of the rate, with the ends (0, 0) and (1, 1) added."""
    inner = [point for point in points if 0 < point[0] < 1]
    return [(0.0, 0.0), *sorted(inner), (1.0, 1.0)]


def area(points: Sequence[tuple[float, float]]) -> float:
    """Area below PGR over rates in [0, 1], by trapezoids, with ends anchored at (0, 0) and (1, 1)."""
    total = 0.0
    for (rate, pgr), (next_rate, next_pgr) in pairwise(anchored(points)):
        total += (next_rate - rate) * (pgr + next_pgr) / 2
    return total


def where_asked(completions: Sequence[Rollout]) -> list[float]:
    """Share of all calls in each tenth of the completion."""
    counts = [0] * BINS
    for completion in completions:
        for start in completion.starts:
            counts[start * BINS // len(completion.tokens)] += 1
    return [count / max(1, sum(counts)) for count in counts]


def at_rate(rows: Sequence[Row], rate: float) -> float:
    """PGR at a realised rate, linear between a curve's points, with ends anchored at (0, 0) and (1, 1)."""
    rates, values = zip(*anchored(rate_and_pgr(rows)), strict=True)
    return float(np.interp(rate, rates, values))


def table(report: QualityReport) -> str:
    """The report as text for people to read."""
    lines = [f"student {report.student:.4f}, teacher {report.teacher:.4f}"]
    if LEARNED in report.budgets:
        lines += ["", *_in_process(report)]
    for name, rows in report.budgets.items():
        if SETTLED in rows[0]:
            lines += ["", *_of_gateway(name, rows)]
    return "\n".join(lines)


def _cells(values: Iterable[object], spec: str) -> str:
    return "".join(format(value, spec) for value in values)


def _in_process(report: QualityReport) -> list[str]:
    heads = _cells(BUDGETS, ">15g")
    lines = []
    if LEARNED in report.curves:
        lines += [
            "PGR at a realised rate of (no bucket), and the area below it",
            f"{'method':<22}{heads}{'area':>9}",
        ]
        for name, rows in report.curves.items():
            cells = _cells([at_rate(rows, budget) for budget in BUDGETS], ">15.2f")
            lines.append(f"{name:<22}{cells}{report.area[name]:>9.3f}")
        lines.append("")
    lines += ["under the bucket of a budget of, at the calibrated price: PGR (realised rate)"]
    lines.append(f"{'gate':<22}{heads}")
    for name, rows in report.budgets.items():
        shown = dict.fromkeys(BUDGETS, "")
        for row in rows:
            if row["budget"] in shown:
                shown[row["budget"]] = f"{row['pgr']:.2f} ({row['rate']:.3f})"
        lines.append(f"{name:<22}" + _cells(shown.values(), ">15"))
    errors = [row.get(ERROR, math.nan) for row in report.budgets[LEARNED]]
    lines.append(f"{'± (learned)':<22}" + _cells(errors, ">15.2f"))
    if "cost" in report.budgets[LEARNED][0]:
        lines += [
            "",
            "and what the teachers wrote there, in tokens of the dearest per token of the completion",
        ]
        for name, rows in report.budgets.items():
            lines.append(f"{name:<22}" + _cells(column(rows, "cost"), ">15.4f"))
    lines += ["", "what the learned gate's budgets cost per request"]
    for key, label in COSTS.items():
        lines.append(f"{label:<22}" + _cells(column(report.budgets[LEARNED], key), ">15.2f"))
    return [*lines, "", f"aiming at the rate: mean |realised - requested| {report.calibration_mae:.4f}"]


def _of_gateway(name: str, rows: Sequence[Row]) -> list[str]:
    columns = ("budget", "quality", "similarity", "pgr", "rate", SETTLED, *COSTS, "excess", "degraded", ERROR)
    title = "the gateway" if name == GATEWAY else name
    lines = [f"{title}; calls, runs and positions per request", _cells(columns, ">13")]
    for row in rows:
        lines.append(_cells([row.get(key, math.nan) for key in columns], ">13.4g"))
    return [*lines, f"area below the PGR at each rate: {area(rate_and_pgr(rows)):.3f}"]
