"""Measures a pair in process: quality against realised teacher rate of every gate, oracle and baseline."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from measuring.examples import sources_of
from measuring.scores import recovered
from router.checkpoint import CheckpointError, RouterCheckpoint
from router.gate import CONFIDENCE_GATES, TeachersGate
from router.gate_names import LEARNED
from training.evaluation.baselines import hesitation, query_level
from training.evaluation.report import (
    BUDGETS,
    SPENT,
    QualityReport,
    area,
    missed,
    rate_and_pgr,
    where_asked,
)
from training.evaluation.scoring import Row, error_of_share, point, relative_cost
from training.gating.cheaper import Cheaper, alone
from training.gating.head import Head
from training.gating.lessons import regret
from training.gating.prompts import Trees
from training.gating.rollout import FREE, Positions, Rollout
from training.gating.room import Room
from training.gating.router_stage import FrozenPair
from training.gating.scorer import Scorer
from training.gating.tree import PERIODIC, Alone, Setting, ends
from training.loop.progress import console
from training.tasks import Example, Task
from training.tokenizer import load_tokenizer
from training.workspace import CHEAPER

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
"""Shares of positions whose scores are below the prices of a curve."""

QUERY_SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
"""Shares of requests that the query-level baselines send to the teacher."""


class Evaluation:
    """The evaluation of a pair on some examples.

    Args:
        pair: directory of teacher, student and router.
        task: the task that scores the completions.
        examples: examples of the task; those that are too long are left out.
        max_tokens: longest completion, in tokens.
        others: directories of further routers for the same student, by name.
    """

    def __init__(
        self, pair: Path, task: Task, examples: list[Example], max_tokens: int, others: dict[str, Path]
    ) -> None:
        self.router = RouterCheckpoint.load(pair / "router")
        self.router.check_student(pair / "student")
        tokenizer = load_tokenizer(pair / "student")
        config = self.router.config
        self.spans = spans_of(self.router)
        further = [
            Cheaper(teacher.name, teacher.cost, pair / CHEAPER / teacher.name)
            for teacher in config.teachers[:-1]
        ]
        frozen = FrozenPair(
            pair / "teacher", pair / "student", tokenizer, *self.spans, max_tokens, tuple(further)
        )
        loop = frozen.load()
        Head.of(loop.student, self.router).install(loop.student)
        self.gates = [LEARNED, *CONFIDENCE_GATES]
        gates = {name: self.router.build_gate(name) for name in self.gates}
        models = (loop.student, loop.teacher, *loop.cheaper)
        room = Room.of(tokenizer, [model.config for model in models], max_tokens)
        examples = room.kept(examples, "test")
        self.trees = Trees(loop, tokenizer, sources_of(examples), gates, config.budget_prompt)
        self.tree = self.trees(0.0)
        self.tree.add("oracle", regret)
        self.tree.add("oracle_kl", kl)
        learned = self.router.learned_gate()
        if isinstance(learned, TeachersGate):
            for number, output in enumerate(self.router.outputs):
                self.tree.add(alone(output.teacher), Alone(learned, number))
        self.others: dict[str, RouterCheckpoint] = {}
        for name, directory in others.items():
            router = further_router(directory, pair / "student")
            self.others[name] = router
            self.tree.add(name, gate_of(router, loop.student))
        self.scorer = Scorer(task, tokenizer, examples)
        self.alone, self.taught = self.tree.run(ends(LEARNED))
        self.student = self.scorer(self.alone).quality
        self.teacher = self.scorer(self.taught).quality
        self.alone_qualities = self.scorer.qualities(self.alone)
        self.taught_qualities = self.scorer.qualities(self.taught)

    def row(self, completions: Sequence[Rollout], setting: Setting) -> Row:
        """The row of a setting: the scores and counts of its completions."""
        measured = point(completions, self.tree.prompt_tokens, setting, *self.scorer(completions))
        share = recovered(measured.quality, self.student, self.teacher)
        qualities = self.scorer.qualities(completions)
        error = error_of_share(qualities, self.alone_qualities, self.taught_qualities)
        row = asdict(measured) | {"pgr": share, "pgr_error": error}
        if self.router.outputs:
            row["cost"] = relative_cost(completions, [output.cost for output in self.router.outputs])
        return row

    def rows(self, settings: Sequence[Setting]) -> list[Row]:
        """A row for each setting, from prompts without a budget in words."""
        return list(map(self.row, self.tree.run(settings), settings))

    def prompted(self, budget: float, setting: Setting) -> Row:
        """The row of a setting, from prompts with this budget in words if the router needs words."""
        return self.row(self.trees(budget).run([setting])[0], setting)

    def curve(self, name: str, span: int) -> list[Row]:
        """A method's rows in order of the realised rate, at several prices without a bucket.

        Args:
            name: name of a gate or an oracle, or PERIODIC.
            span: number of tokens in a call.
        """
        if name == LEARNED and self.router.config.budget_prompt is not None:
            return self.prompted_curve(span)
        shares = torch.tensor(SHARES, dtype=torch.float64)
        scores = shares if name == PERIODIC else torch.quantile(self.tree.scores(name).double(), shares)
        settings = [Setting(name, price, FREE, span) for price in sorted(set(scores.tolist()))]
        return sorted(self.rows(settings), key=lambda row: row["rate"])

    def prompted_curve(self, span: int) -> list[Row]:
        """The learned gate's curve with budgets in words: a row for each calibrated budget.

        At a budget b, the price is the 1 - b quantile of the scores.
        """
        rows = []
        for budget, _ in self.router.config.calibration[LEARNED]:
            price = torch.quantile(self.trees(budget).scores(LEARNED).double(), 1 - budget).item()
            rows.append(self.prompted(budget, Setting(LEARNED, price, FREE, span)))
        return sorted(rows, key=lambda row: row["rate"])

    def query_level(self, worth: torch.Tensor) -> list[Row]:
        """Rows of a query-level baseline, which sends the requests of largest `worth` (requests,) first."""
        mixed = query_level(self.alone, self.taught, worth, QUERY_SHARES)
        # The teacher writes these completions as a whole, so the fraction is 1, and there is no price.
        return [self.row(run, Setting("query", 0.0, 1.0, 1)) for run in mixed]

    def curves(self, spans: Sequence[int]) -> dict[str, list[Row]]:
        """A curve for every method: first with the router's calls, then with calls of other lengths."""
        ask = self.spans[1]
        curves = self._gate_curves(ask, "")
        curves["query"] = self.query_level(hesitation(self.tree, self.alone))
        curves["query_oracle"] = self.query_level(self.taught_qualities - self.alone_qualities)
        for span in spans:
            if span != ask:
                curves |= self._gate_curves(span, f"@{span}")
        return curves

    def _gate_curves(self, span: int, suffix: str) -> dict[str, list[Row]]:
        names = [*self.gates, *self.others, "oracle", "oracle_kl", PERIODIC]
        silent = not console.is_terminal
        curves = {}
        for name in track(names, f"curves{suffix}", console=console, transient=True, disable=silent):
            curves[name + suffix] = self.curve(name, span)
        return curves

    def budgets(self) -> dict[str, list[Row]]:
        """The rows of each calibrated gate, under the buckets of `BUDGETS`."""
        rows = {}
        for name in self.router.config.calibration:
            prices = self.router.calibration(name)
            rows[name] = self.at_budgets([Setting(name, prices.price(b), b, *self.spans) for b in BUDGETS])
        if LEARNED in self.router.config.spare:
            prices = self.router.calibration()
            spares = self.router.spare()
            settings = []
            for budget in BUDGETS:
                spare = spares.price(budget)
                settings.append(Setting(LEARNED, prices.price(budget), budget, *self.spans, spare=spare))
            rows[SPENT] = self.at_budgets(settings)
        for output in self.router.outputs:
            if output.alone is not None:
                name, own = alone(output.teacher), output.alone
                rows[name] = self.rows([Setting(name, own.price(b), b, *self.spans) for b in BUDGETS])
        for name, router in self.others.items():
            if LEARNED in router.config.calibration:
                prices = router.calibration()
                spans = spans_of(router)
                rows[name] = self.rows([Setting(name, prices.price(b), b, *spans) for b in BUDGETS])
        return rows

    def at_budgets(self, settings: Sequence[Setting]) -> list[Row]:
        """A row for each setting, from prompts with its budget in words if the router needs words."""
        if self.router.config.budget_prompt is None:
            return self.rows(settings)
        return [self.prompted(setting.fraction, setting) for setting in settings]

    def served_qualities(self, budgets: Sequence[float]) -> Tensor:
        """(examples,) quality under the bucket at calibrated prices, as the mean over these budgets."""
        prices = self.router.calibration()
        qualities = []
        for budget in budgets:
            setting = Setting(LEARNED, prices.price(budget), budget, *self.spans)
            qualities.append(self.scorer.qualities(self.trees(budget).run([setting])[0]))
        return torch.stack(qualities).mean(0)

    def asked(self, budget: float = 0.1) -> list[float]:
        """Share of the learned gate's calls in each tenth of the completion."""
        setting = Setting(LEARNED, self.router.calibration().price(budget), budget, *self.spans)
        return where_asked(self.trees(budget).run([setting])[0])


def kl(positions: Positions) -> Tensor:
    """Scores (N,) of the oracle that knows the teacher's distribution: KL(student, teacher), in nats."""
    return positions.kl


def spans_of(router: RouterCheckpoint) -> tuple[int, int]:
    """(span_tokens, ask_tokens) that a router was trained for."""
    config = router.config
    return config.span_tokens, config.ask_tokens or config.span_tokens


def further_router(directory: Path, student: Path) -> RouterCheckpoint:
    """Load another router of the same student.

    Raises:
        CheckpointError: the router is for another student or several teachers, or it needs budgets in words.
    """
    checkpoint = RouterCheckpoint.load(directory)
    checkpoint.check_student(student)
    if checkpoint.config.budget_prompt is not None:
        raise CheckpointError(
            f"{directory}: this router needs budgets in words; evaluate a pair that contains it"
        )
    if checkpoint.outputs:
        raise CheckpointError(
            f"{directory}: this router has several teachers; evaluate a pair that contains it"
        )
    return checkpoint


def gate_of(router: RouterCheckpoint, student: PreTrainedModel) -> Callable[[Positions], Tensor]:
    """A function that scores positions with a router's learned gate; its taps need not be in the student."""
    head = Head.of(student, router)
    return lambda positions: head.scores(positions.states)


def evaluate_pair(
    pair: Path,
    task: Task,
    examples: list[Example],
    spans: Sequence[int] | None,
    max_tokens: int,
    others: dict[str, Path] | None = None,
) -> QualityReport:
    """Measure curves and budgets of all methods.

    Args:
        pair: directory of teacher, student and router.
        task: the task that scores the completions.
        examples: examples of the task.
        spans: lengths of the curves' calls in tokens, in addition to the router's own; None: no curves.
        max_tokens: longest completion, in tokens.
        others: directories of further routers, by name.
    """
    evaluation = Evaluation(pair, task, examples, max_tokens, others or {})
    curves = {} if spans is None else evaluation.curves(spans)
    budgets = evaluation.budgets()
    aimed = budgets.get(SPENT, budgets[LEARNED])
    return QualityReport(
        student=evaluation.student,
        teacher=evaluation.teacher,
        curves=curves,
        area={name: area(rate_and_pgr(rows)) for name, rows in curves.items()},
        calibration_mae=sum(map(missed, aimed)) / len(BUDGETS),
        budgets=budgets,
        asked=evaluation.asked(),
    )
