"""Measures gates and prices in the closed loop on validation data, in shares of the pair's gap in quality."""

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
"""Shares of positions whose scores are below the prices that a gate is judged at."""


@dataclass(frozen=True)
class Gap:
    """The gap in quality between student and teacher, and qualities in units of it."""

    scorer: Scorer
    student: float
    teacher: float

    @property
    def size(self) -> float:
        """Size of the gap; 1 if the teacher is not better, so that qualities keep their unit."""
        return self.teacher - self.student if self.teacher > self.student else 1.0

    def share(self, run: Run) -> float:
        """Quality of a run, in units of the gap."""
        return self.scorer(run).quality / self.size

    def noise(self, first: Run, second: Run) -> float:
        """Standard error of the difference between two runs' qualities, in units of the gap.

        It is computed from the examples' own qualities, even if the task's quality is not their mean.
        """
        return standard_error(self.scorer.qualities(first) - self.scorer.qualities(second)) / self.size


class GateValidation:
    """Validation of one pair's gates.

    Args:
        loop: the pair.
        task: the task that scores the completions.
        tokenizer: the tokenizer of the pair.
        examples: the examples of the validation split.
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
        """Mean length of the student's own completions, in tokens."""

    def judged(self, gate: Gate) -> float:
        """Mean share of the gap that the gate recovers, over all budgets under their buckets.

        Each budget gets the best of the same few prices, so the result does not depend on the dual variables'
        noise.

        Args:
            gate: the learned gate, whose taps are in the student.
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
