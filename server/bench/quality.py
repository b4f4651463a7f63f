"""Routing quality: what `wheels evaluate` says, as a process of its own, since it belongs to training."""

import json
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from server.bench.plan import Plan
from server.bench.results import Row, Section, Table
from server.local.processes import ServiceError

RATES = (0.05, 0.1, 0.2)
UNDER_BUDGET = {
    "budget": "budget",
    "rate": "rate",
    "exact match": "quality",
    "recovered": "pgr",
    "calls/request": "calls",
}
QUICK_EXAMPLES = 50


def run(plan: Plan) -> Section:
    """Raises ServiceError where the evaluation fails."""
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
                [_curve(method, points, report["area"]) for method, points in report["curves"].items()],
                f"`wheels evaluate`. {ends} Area: below the curve over the whole rate.",
            ),
            "budgets": Table(
                "Under a budget, at calibrated prices",
                [
                    {"gate": gate} | {title: float(point[key]) for title, key in UNDER_BUDGET.items()}
                    for gate, points in report["budgets"].items()
                    for point in points
                ],
            ),
        }
    )


def _curve(method: str, points: list[Mapping[str, float]], area: Mapping[str, float]) -> Row:
    row: dict[str, Any] = {"method": method}
    for rate in RATES:
        row[f"at {rate:.0%}"] = interpolate([(p["rate"], p["pgr"]) for p in points], rate)
    return row | {"area": area.get(method)}


def interpolate(points: list[tuple[float, float]], x: float) -> float:
    """On straight lines between points, the student at (0, 0) and the teacher at (1, 1); x in [0, 1]."""
    points = sorted([*points, (0.0, 0.0), (1.0, 1.0)])
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    raise ValueError(f"not a rate: {x}")
