"""Routing quality, as `wheels evaluate` reports it.

The evaluation runs in a process of its own, since it belongs to training.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from measuring.processes import ServiceError
from server.bench.plan import Plan
from server.bench.results import Row, Section, Table, Value

RATES = (0.05, 0.1, 0.2)
UNDER_BUDGET = {
    "budget": "budget",
    "rate": "rate",
    "exact match": "quality",
    "recovered": "pgr",
    "calls/request": "calls",
}
"""Keys in the report, by column."""
QUICK_EXAMPLES = 50


def run(plan: Plan) -> Section:
    """Quality against the teacher rate, and under a budget.

    Raises:
        ServiceError: the evaluation failed.
    """
    command = [sys.executable, "-m", "wheels", "evaluate", str(plan.pair.student.parent), "--json"]
    if plan.quick:
        command += ["--examples", str(QUICK_EXAMPLES), "--spans", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise ServiceError(f"wheels evaluate failed:\n{done.stderr[-2000:]}")
    report = json.loads(done.stdout.splitlines()[-1])
    ends = f"Student alone {report['student']:.1%}, teacher alone {report['teacher']:.1%}."
    return Section(
        {
            "recovered": Table(
                "Share of the gap recovered, at realised teacher rates",
                _curve_rows(report),
                f"`wheels evaluate`. {ends} Area: below the curve over the whole rate.",
            ),
            "budgets": Table("Under a budget, at calibrated prices", _budget_rows(report)),
        }
    )


def _curve_rows(report: Mapping[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for method, points in report["curves"].items():
        curve = [(point["rate"], point["pgr"]) for point in points]
        row: dict[str, Value] = {"method": method}
        for rate in RATES:
            row[f"at {rate:.0%}"] = interpolate(curve, rate)
        row["area"] = report["area"].get(method)
        rows.append(row)
    return rows


def _budget_rows(report: Mapping[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for gate, points in report["budgets"].items():
        for point in points:
            row: dict[str, Value] = {"gate": gate}
            for title, key in UNDER_BUDGET.items():
                row[title] = float(point[key])
            rows.append(row)
    return rows


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """The curve's y at ``x`` in [0, 1], on straight lines between its points, (0, 0) and (1, 1)."""
    curve = sorted([*points, (0.0, 0.0), (1.0, 1.0)])
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    raise ValueError(f"not a rate: {x}")
