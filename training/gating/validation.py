"""The closed loop on validation data: what gates and prices are worth there, in shares of the gap."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from measuring.examples import Example, sources_of
from router.gate import Gate, RandomGate
from router.gate_names import LEARNED
from router.reserved import ReservedRows
from training.gate_config import GateConfig
from training.gating.calibration import Run, standard_error, teacher_rate
from training.gating.prompts import Trees
from training.gating.rollout import ClosedLoop
from training.gating.scorer import Scorer
from training.gating.tree import Setting, ends
from training.tasks import Task

RANDOM = "random"
SHARES = (0.7, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
"""Of positions below the prices that a gate is judged by."""


@dataclass(frozen=True)
class Gap:
    """Qualities as shares of the gap between student and teacher."""

    scorer: Scorer
    student: float
    teacher: float

    @property
    def size(self) -> float:
        """1 if there is none, so that qualities stay what they are."""
        return self.teacher - self.student if self.teacher > self.student else 1.0

    def share(self, run: Run) -> float:
        """Quality of a run."""
        return self.scorer(run).quality / self.size

    def noise(self, first: Run, second: Run) -> float:
        """By the examples' own qualities, also if the task's is not their mean."""
        return standard_error(self.scorer.qualities(first) - self.scorer.qualities(second)) / self.size


class GateValidation:
    """Of one pair.

    Args:
        loop: the pair.
        task: scores the completions.
        tokenizer: of the pair.
        examples: of the validation split.
        config: budgets and spans.
        reserved: the student's rows for the router.
    """

    def __init__(
        self,
        loop: ClosedLoop,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        examples: list[Example],
        config: GateConfig,
        reserved: ReservedRows,
    ) -> None:
        self._config = config
        gates: dict[str, Gate] = {RANDOM: RandomGate(reserved)}
        self.trees = Trees(loop, tokenizer, sources_of(examples), gates, config.template)
        scorer = Scorer(task, tokenizer, examples)
        alone, taught = self.trees(0.0).run(ends(RANDOM))
        self.gap = Gap(scorer, scorer(alone).quality, scorer(taught).quality)
        self.expected_tokens = sum(len(rollout.tokens) for rollout in alone) / len(alone)
        """Mean length of the student's own completions."""

    def judged(self, gate: Gate) -> float:
        """What the budgets recover under their buckets: mean share of the gap above the student.

        Each has the best of the same few prices, so the dual variables' noise is not in it.

        Args:
            gate: the learned one; its taps are in the student.
        """
        self.trees.add(LEARNED, gate)
        tree = self.trees(0.0)
        prices = torch.quantile(tree.scores(LEARNED).double(), torch.tensor(SHARES, dtype=torch.float64))
        spans = (self._config.span_tokens, self._config.ask_tokens)
        total = 0.0
        for budget in self._config.budgets:
            runs = tree.run([Setting(LEARNED, price, budget, *spans) for price in prices.tolist()])
            shares = [self.gap.share(run) for run in runs if teacher_rate(run) <= budget]
            total += max(shares, default=self.gap.student / self.gap.size)
        return total / len(self._config.budgets) - self.gap.student / self.gap.size
