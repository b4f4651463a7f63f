"""Plots of the report of `wheels evaluate`."""

from pathlib import Path

import numpy as np

from router.gate_names import LEARNED
from training.evaluation.report import (
    BINS,
    BUDGETS,
    GATEWAY,
    QualityReport,
    column,
)
from training.gating.tree import PERIODIC

SHOWN = {
    LEARNED: "learned gate",
    "entropy": "entropy of the student",
    "margin": "margin of the student's two best tokens",
    "max_probability": "the student's highest probability",
    "random": "at random",
    PERIODIC: "evenly",
    "query": "whole requests, the most hesitant first",
    "query_oracle": "whole requests, knowing which gain most",
    "oracle": "knowing the regret of every token",
    "oracle_kl": "knowing the teacher's distribution",
    GATEWAY: "gateway, measured",
}
"""Titles of the methods, in the legend's order; a further router keeps its own name."""


def plot(report: QualityReport, directory: Path) -> None:
    """Draw `quality.png`, `calibration.png` and `where.png` in the directory."""
    import matplotlib

    matplotlib.use("Agg")
    _plot_quality(report, directory / "quality.png")
    _plot_calibration(report, directory / "calibration.png")
    _plot_where(report, directory / "where.png")


def _plot_quality(report: QualityReport, file: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    measured = LEARNED in report.curves
    curves = report.curves if measured else report.budgets  # a gateway's rows are in both
    names = [name for name in curves if "@" not in name]  # the router's own calls
    others = [name for name in names if name not in SHOWN]
    main = LEARNED if LEARNED in names else GATEWAY
    colours = iter(pyplot.colormaps["tab20"](range(20)))
    for name in dict.fromkeys((main, *others, *SHOWN)):
        if name not in names:
            continue
        rows = curves[name]
        style = {"linestyle": "--"} if "oracle" in name else {"linewidth": 2.5 if name == main else 1.5}
        axes.plot(
            [100 * rate for rate in column(rows, "rate")],
            column(rows, "quality"),
            marker=".",
            label=SHOWN.get(name, name),
            color=next(colours),
            **style,
        )
    for value, whose in ((report.student, "student alone"), (report.teacher, "teacher alone")):
        axes.axhline(value, color="grey", linewidth=0.8, linestyle=":")
        axes.annotate(
            whose, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="grey"
        )
    axes.set(xlabel="tokens that the teacher wrote, %", ylabel="quality")
    asked = "when the teacher is asked" + ("" if measured else ",\nunder the bucket")
    axes.legend(title=asked, loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def _plot_calibration(report: QualityReport, file: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 5))
    for name, rows in report.budgets.items():
        axes.plot(column(rows, "budget"), column(rows, "rate"), marker="o", label=name)
    axes.plot(BUDGETS, BUDGETS, color="grey", linestyle=":")
    axes.set(xlabel="budget", ylabel="realised teacher rate")
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _plot_where(report: QualityReport, file: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3))
    axes.bar((np.arange(BINS) + 0.5) / BINS, report.asked, width=0.9 / BINS)
    axes.set(xlabel="place in the completion", ylabel="share of teacher calls")
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
