"""`wheels evaluate`: quality against realised teacher rate for every gate, as a table, JSON and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch

from router.checkpoint import RouterCheckpoint
from router.gate import CONFIDENCE_GATES
from training.evaluate import Point, Scorer, ends, measure, recovered
from training.gates import GAINS
from training.rollout import FREE, Completion
from training.router_stage import install_taps, load_cooperation
from training.tasks import Example, Task
from training.tokenizer import encode_prompts, load_tokenizer
from training.tree import Setting, Tree

SHARES = [
    0.2,
    0.4,
    0.5,
    0.6,
    0.65,
    0.7,
    0.75,
    0.8,
    0.83,
    0.86,
    0.88,
    0.9,
    0.92,
    0.94,
    0.95,
    0.96,
    0.97,
    0.98,
    0.99,
]
BUDGETS = (0.05, 0.1, 0.2, 0.3, 0.5)
BINS = 10


@dataclass(frozen=True)
class Report:
    """curves: per method, PGR at realised rates without a bucket, spans of the router's ask_tokens; a method
    with `@K` has spans of K. budgets: the learned gate and the others under the bucket, at their calibrated
    prices. asked: share of the learned gate's calls (budget 0.1) in each tenth of the completion."""

    student: float
    teacher: float
    curves: dict[str, list[dict[str, float]]]
    area: dict[str, float]
    calibration_mae: float
    budgets: dict[str, list[dict[str, float]]]
    asked: list[float]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def evaluate_pair(
    pair: Path, task: Task, examples: list[Example], spans: Sequence[int], max_tokens: int
) -> Report:
    """pair: a directory with teacher, student and router, as `wheels train` exports it."""
    tokenizer = load_tokenizer(pair / "student")
    checkpoint = RouterCheckpoint.load(pair / "router")
    checkpoint.check_student(pair / "student")
    config = checkpoint.config
    ask = config.ask_tokens or config.span_tokens
    cooperation = load_cooperation(
        pair / "teacher", pair / "student", tokenizer, (config.span_tokens, ask), max_tokens
    )
    install_taps(cooperation, checkpoint.taps, checkpoint.reserved)
    gates = {"learned": checkpoint.build_gate()} | {n: checkpoint.build_gate(n) for n in CONFIDENCE_GATES}
    tree = Tree(cooperation, encode_prompts(tokenizer, [e.source for e in examples]), gates)
    tree.add("oracle", GAINS["excess"])
    tree.add("oracle_kl", GAINS["kl"])

    scorer = Scorer(task, tokenizer, examples)

    def at(settings: list[Setting]) -> list[Point]:
        return measure(tree, settings, scorer)

    student, teacher = (point.quality for point in at(ends("learned")))
    curves: dict[str, list[dict[str, float]]] = {}
    for span in (ask, *(s for s in spans if s != ask)):
        for name in (*gates, "oracle", "oracle_kl"):
            prices = torch.quantile(tree.scores(name).double(), torch.tensor(SHARES).double()).tolist()
            points = at([Setting(name, price, FREE, span) for price in sorted(set(prices))])
            curves[name if span == ask else f"{name}@{span}"] = [
                {"rate": p.rate, "quality": p.quality, "pgr": recovered(p.quality, student, teacher)}
                | {"calls": p.calls, "similarity": p.similarity}
                for p in sorted(points, key=lambda p: p.rate)
            ]
    budgets = {
        name: [
            asdict(p) | {"pgr": recovered(p.quality, student, teacher)}
            for p in at(
                [
                    Setting(name, checkpoint.calibration(name).price(b), b, config.span_tokens, ask)
                    for b in BUDGETS
                ]
            )
        ]
        for name in gates
    }
    (run,) = tree.run([Setting("learned", checkpoint.calibration().price(0.1), 0.1, config.span_tokens, ask)])
    return Report(
        student=student,
        teacher=teacher,
        curves=curves,
        area={name: area([(p["rate"], p["pgr"]) for p in points]) for name, points in curves.items()},
        calibration_mae=sum(abs(p["rate"] - p["budget"]) for p in budgets["learned"]) / len(BUDGETS),
        budgets=budgets,
        asked=where_asked(run),
    )


def area(points: Sequence[tuple[float, float]]) -> float:
    """Area below PGR over the rate in [0, 1], trapezoids, ends anchored at (0, 0) and (1, 1)."""
    anchored = [(0.0, 0.0), *sorted(p for p in points if 0 < p[0] < 1), (1.0, 1.0)]
    return sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(anchored))


def where_asked(completions: Sequence[Completion]) -> list[float]:
    """Share of all calls in each tenth of the completion."""
    counts = [0] * BINS
    for completion in completions:
        for start in completion.starts:
            counts[start * BINS // len(completion.tokens)] += 1
    return [count / max(1, sum(counts)) for count in counts]


def table(report: Report) -> str:
    lines = [f"student {report.student:.3f}, teacher {report.teacher:.3f}", ""]
    lines.append("under the bucket, at the calibrated price: PGR (realised rate)")
    lines.append(f"{'gate':<18}" + "".join(f"{b:>15g}" for b in BUDGETS))
    for name, points in report.budgets.items():
        cells = (f"{p['pgr']:.2f} ({p['rate']:.3f})" for p in points)
        lines.append(f"{name:<18}" + "".join(f"{cell:>15}" for cell in cells))
    lines += ["", "area below PGR over the realised rate, no bucket"]
    lines += [f"{name:<18}{value:.3f}" for name, value in report.area.items()]
    lines += ["", f"calibration: mean |realised - requested| {report.calibration_mae:.3f}"]
    return "\n".join(lines)


def plot(report: Report, directory: Path) -> None:
    """quality.png, calibration.png, where.png"""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    for name, points in report.curves.items():
        if "@" not in name:
            axes.plot([p["rate"] for p in points], [p["quality"] for p in points], marker=".", label=name)
    for value in (report.student, report.teacher):
        axes.axhline(value, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="realised teacher rate", ylabel="quality")
    axes.legend()
    figure.savefig(directory / "quality.png", dpi=120)

    figure, axes = pyplot.subplots(figsize=(5, 5))
    for name, points in report.budgets.items():
        axes.plot([p["budget"] for p in points], [p["rate"] for p in points], marker="o", label=name)
    axes.plot(BUDGETS, BUDGETS, color="grey", linestyle=":")
    axes.set(xlabel="budget", ylabel="realised teacher rate")
    axes.legend()
    figure.savefig(directory / "calibration.png", dpi=120)

    figure, axes = pyplot.subplots(figsize=(5, 3))
    axes.bar([(i + 0.5) / BINS for i in range(BINS)], report.asked, width=0.9 / BINS)
    axes.set(xlabel="place in the completion", ylabel="share of teacher calls")
    figure.savefig(directory / "where.png", dpi=120, bbox_inches="tight")
    pyplot.close("all")
