"""`wheels evaluate`: quality against realised teacher rate for every gate, as a table, JSON and plots."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from measuring.scores import recovered
from router.checkpoint import CheckpointError, RouterCheckpoint
from router.gate import CONFIDENCE_GATES
from training.evaluation.baselines import hesitation, query_level
from training.evaluation.gateway import Measured
from training.evaluation.scoring import point
from training.gating.head import Head
from training.gating.lessons import regret
from training.gating.prompts import Trees
from training.gating.rollout import FREE, Rollout
from training.gating.room import Room
from training.gating.rounds import install_taps
from training.gating.router_stage import FrozenPair
from training.gating.scorer import Scorer
from training.gating.tree import PERIODIC, Setting, ends
from training.loop.progress import console
from training.tasks import Example, Task
from training.tokenizer import load_tokenizer

SHARES = (
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
)
"""Of positions below the prices of a curve."""
QUERY_SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
BUDGETS = (0.05, 0.1, 0.2, 0.3, 0.5)
BINS = 10
LEARNED, SPENT, GATEWAY = "learned", "learned, aim: rate", "gateway"
METHODS = (LEARNED, *CONFIDENCE_GATES, "oracle", "oracle_kl", PERIODIC, "query", "query_oracle", GATEWAY)
"""Names that no further router can have."""

COSTS = {"calls": "teacher calls", "runs": "runs of calls", "positions": "teacher positions"}

Row = dict[str, float]


@dataclass(frozen=True)
class QualityReport:
    """curves: per method, PGR at realised rates without a bucket, spans of the router's ask_tokens; a method
    with `@K` has spans of K. budgets: gates under the bucket, at their calibrated prices. calibration_mae:
    mean |realised - requested| rate of the learned gate where it aims at the rate. asked: share of the
    learned gate's calls (budget 0.1) in each tenth of the completion.

    A gateway that was measured is a method of its own, `gateway`, under the bucket in `curves` too, its share
    of the gap between its own budgets 0 and 1; alone, it is what all the rest is of.
    """

    student: float
    teacher: float
    curves: dict[str, list[Row]]
    area: dict[str, float]
    calibration_mae: float
    budgets: dict[str, list[Row]]
    asked: list[float]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Evaluation:
    """A pair of a directory with teacher, student and router, over `examples`; `others`: further routers for
    the same student, by name.
    """

    def __init__(
        self, pair: Path, task: Task, examples: list[Example], max_tokens: int, others: dict[str, Path]
    ) -> None:
        self.router = RouterCheckpoint.load(pair / "router")
        self.router.check_student(pair / "student")
        tokenizer = load_tokenizer(pair / "student")
        config = self.router.config
        self.spans = (config.span_tokens, config.ask_tokens or config.span_tokens)
        frozen = FrozenPair(pair / "teacher", pair / "student", tokenizer, *self.spans, max_tokens)
        loop = frozen.load()
        install_taps(loop, Head.of(loop.student, self.router))
        self.gates = [LEARNED, *CONFIDENCE_GATES]
        gates = {name: self.router.build_gate(name) for name in self.gates}
        room = Room.of(tokenizer, [loop.student.config, loop.teacher.config], max_tokens)
        examples = room.kept(examples, "test")
        sources = [example.source for example in examples]
        self.trees = Trees(loop, tokenizer, sources, gates, config.budget_prompt)
        self.tree = self.trees(0.0)
        self.tree.add("oracle", regret)
        self.tree.add("oracle_kl", lambda positions: positions.kl)
        self.others = list(others)
        for name, directory in others.items():
            checkpoint = RouterCheckpoint.load(directory)
            checkpoint.check_student(pair / "student")
            if checkpoint.config.budget_prompt is not None:
                raise CheckpointError(f"{directory}: its budgets are prompted; evaluate a pair that holds it")
            head = Head.of(loop.student, checkpoint)
            self.tree.add(name, lambda positions, head=head: head.scores(positions.states))
        self.scorer = Scorer(task, tokenizer, examples)
        self.alone, self.taught = self.tree.run(ends(LEARNED))
        self.student, self.teacher = (self.scorer(run).quality for run in (self.alone, self.taught))

    def row(self, completions: Sequence[Rollout], setting: Setting) -> Row:
        measured = point(completions, self.tree.prompt_tokens, setting, *self.scorer(completions))
        return asdict(measured) | {"pgr": recovered(measured.quality, self.student, self.teacher)}

    def rows(self, settings: Sequence[Setting]) -> list[Row]:
        return [
            self.row(run, setting) for run, setting in zip(self.tree.run(settings), settings, strict=True)
        ]

    def prompted(self, budget: float, setting: Setting) -> Row:
        """Where budgets are prompted, the trained gate's row at this one."""
        return self.row(self.trees(budget).run([setting])[0], setting)

    def curve(self, name: str, span: int) -> list[Row]:
        if name == LEARNED and self.router.config.budget_prompt is not None:
            return self.prompted_curve(span)
        shares = torch.tensor(SHARES, dtype=torch.float64)
        scores = shares if name == PERIODIC else torch.quantile(self.tree.scores(name).double(), shares)
        settings = [Setting(name, price, FREE, span) for price in sorted(set(scores.tolist()))]
        return sorted(self.rows(settings), key=lambda row: row["rate"])

    def prompted_curve(self, span: int) -> list[Row]:
        """A point for each calibrated budget, in words, at the price that its share of positions exceeds."""
        budgets = [budget for budget, _ in self.router.config.calibration[LEARNED]]
        prices = [torch.quantile(self.trees(b).scores(LEARNED).double(), 1 - b).item() for b in budgets]
        rows = [
            self.prompted(b, Setting(LEARNED, p, FREE, span)) for b, p in zip(budgets, prices, strict=True)
        ]
        return sorted(rows, key=lambda row: row["rate"])

    def query_level(self, worth: torch.Tensor) -> list[Row]:
        mixed = query_level(self.alone, self.taught, worth, QUERY_SHARES)
        # Whole completions: a fraction of 1 for the requests that have it, no price.
        return [self.row(run, Setting("query", 0.0, 1.0, 1)) for run in mixed]

    def curves(self, spans: Sequence[int]) -> dict[str, list[Row]]:
        names = [*self.gates, *self.others, "oracle", "oracle_kl", PERIODIC]
        ask = self.spans[1]
        jobs = {name: (name, ask) for name in names}
        jobs |= {f"{name}@{k}": (name, k) for k in spans if k != ask for name in names}
        curves = {
            title: self.curve(*job)
            for title, job in track(
                jobs.items(), "curves", console=console, transient=True, disable=not console.is_terminal
            )
        }
        curves["query"] = self.query_level(hesitation(self.tree, self.alone))
        curves["query_oracle"] = self.query_level(
            self.scorer.each(self.taught) - self.scorer.each(self.alone)
        )
        return dict(sorted(curves.items(), key=lambda curve: "@" in curve[0]))  # other spans last

    def budgets(self) -> dict[str, list[Row]]:
        rows = {}
        for name in self.router.config.calibration:
            prices = self.router.calibration(name)
            rows[name] = self.at_budgets([Setting(name, prices.price(b), b, *self.spans) for b in BUDGETS])
        if LEARNED in self.router.config.spare:
            prices, spares = self.router.calibration(), self.router.spare()
            rows[SPENT] = self.at_budgets(
                [Setting(LEARNED, prices.price(b), b, *self.spans, spare=spares.price(b)) for b in BUDGETS]
            )
        return rows

    def at_budgets(self, settings: Sequence[Setting]) -> list[Row]:
        if self.router.config.budget_prompt is None:
            return self.rows(settings)
        return [self.prompted(setting.fraction, setting) for setting in settings]

    def asked(self, budget: float = 0.1) -> list[float]:
        setting = Setting(LEARNED, self.router.calibration().price(budget), budget, *self.spans)
        return where_asked(self.trees(budget).run([setting])[0])


def evaluate_pair(
    pair: Path,
    task: Task,
    examples: list[Example],
    spans: Sequence[int],
    max_tokens: int,
    others: dict[str, Path] | None = None,
) -> QualityReport:
    """The protocol; `spans`: lengths of the curves, beside the router's own."""
    evaluation = Evaluation(pair, task, examples, max_tokens, others or {})
    curves, budgets = evaluation.curves(spans), evaluation.budgets()
    aimed = budgets.get(SPENT, budgets[LEARNED])
    return QualityReport(
        student=evaluation.student,
        teacher=evaluation.teacher,
        curves=curves,
        area={name: area([(row["rate"], row["pgr"]) for row in rows]) for name, rows in curves.items()},
        calibration_mae=sum(abs(row["rate"] - row["budget"]) for row in aimed) / len(BUDGETS),
        budgets=budgets,
        asked=evaluation.asked(),
    )


def gateway_report(measured: Measured) -> QualityReport:
    """Of a gateway alone."""
    between = [row for row in measured.rows if 0 < row["budget"] < 1]
    example = min(range(len(measured.rows)), key=lambda i: abs(measured.rows[i]["budget"] - 0.1))
    return QualityReport(
        student=measured.student,
        teacher=measured.teacher,
        curves={GATEWAY: measured.rows},
        area={GATEWAY: area([(row["rate"], row["pgr"]) for row in measured.rows])},
        calibration_mae=sum(abs(row["rate"] - row["budget"]) for row in between) / max(1, len(between)),
        budgets={GATEWAY: measured.rows},
        asked=where_asked(measured.completions[example]),
    )


def joined(report: QualityReport, gateway: QualityReport) -> QualityReport:
    """What was computed in process, and beside it the gateway's rows."""
    both = {name: getattr(report, name) | getattr(gateway, name) for name in ("curves", "area", "budgets")}
    return replace(report, **both)


def area(points: Sequence[tuple[float, float]]) -> float:
    """Area below PGR over the rate in [0, 1], trapezoids, ends anchored at (0, 0) and (1, 1)."""
    anchored = [(0.0, 0.0), *sorted(p for p in points if 0 < p[0] < 1), (1.0, 1.0)]
    return sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(anchored))


def where_asked(completions: Sequence[Rollout]) -> list[float]:
    """Share of all calls in each tenth of the completion."""
    counts = [0] * BINS
    for completion in completions:
        for start in completion.starts:
            counts[start * BINS // len(completion.tokens)] += 1
    return [count / max(1, sum(counts)) for count in counts]


def at_rate(rows: Sequence[Row], rate: float) -> float:
    """PGR at a realised rate: linear between the points of a curve, ends anchored at (0, 0) and (1, 1)."""
    points = sorted((row["rate"], row["pgr"]) for row in rows if 0 < row["rate"] < 1)
    rates, values = zip((0.0, 0.0), *points, (1.0, 1.0), strict=True)
    return float(np.interp(rate, rates, values))


def table(report: QualityReport) -> str:
    lines = [f"student {report.student:.4f}, teacher {report.teacher:.4f}"]
    if LEARNED in report.budgets:
        lines += ["", *_in_process(report)]
    if GATEWAY in report.budgets:
        lines += ["", *_of_gateway(report.budgets[GATEWAY])]
    return "\n".join(lines)


def _in_process(report: QualityReport) -> list[str]:
    heads = "".join(f"{b:>15g}" for b in BUDGETS)
    lines = [
        "PGR at a realised rate of (no bucket), and the area below it",
        f"{'method':<22}{heads}{'area':>9}",
    ]
    for name, rows in report.curves.items():
        cells = "".join(f"{at_rate(rows, b):>15.2f}" for b in BUDGETS)
        lines.append(f"{name:<22}{cells}{report.area[name]:>9.3f}")
    lines += ["", "under the bucket of a budget of, at the calibrated price: PGR (realised rate)"]
    lines.append(f"{'gate':<22}{heads}")
    for name, rows in report.budgets.items():
        at = {row["budget"]: f"{row['pgr']:.2f} ({row['rate']:.3f})" for row in rows}
        lines.append(f"{name:<22}" + "".join(f"{at.get(b, ''):>15}" for b in BUDGETS))
    lines += ["", "what the learned gate's budgets cost per request"]
    for key, label in COSTS.items():
        lines.append(f"{label:<22}" + "".join(f"{row[key]:>15.2f}" for row in report.budgets[LEARNED]))
    return [*lines, "", f"aiming at the rate: mean |realised - requested| {report.calibration_mae:.4f}"]


def _of_gateway(rows: Sequence[Row]) -> list[str]:
    columns = ("budget", "quality", "similarity", "pgr", "rate", *COSTS, "excess", "degraded")
    lines = ["the gateway; calls, runs and positions per request", "".join(f"{c:>11}" for c in columns)]
    return lines + ["".join(f"{row[c]:>11.4g}" for c in columns) for row in rows]


def plot(report: QualityReport, directory: Path) -> None:
    """quality.png, calibration.png, where.png"""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    axes.set_prop_cycle(color=pyplot.colormaps["tab20"].colors)
    for name, points in report.curves.items():
        if "@" not in name:  # the router's own span length
            axes.plot([p["rate"] for p in points], [p["quality"] for p in points], marker=".", label=name)
    for value in (report.student, report.teacher):
        axes.axhline(value, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="realised teacher rate", ylabel="quality")
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.savefig(directory / "quality.png", dpi=120, bbox_inches="tight")

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
