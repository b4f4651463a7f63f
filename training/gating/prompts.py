"""Prompts of the rollouts: as they are, or with a budget in words in front of them, which only the student
reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from transformers import PreTrainedTokenizerBase

from router.checkpoint import budget_text
from training.config import GateConfig
from training.gating.rollout import Cooperation
from training.gating.tree import ScoreGate, Tree
from training.tokenizer import encode_prompts


@dataclass(frozen=True)
class Prompts:
    """ids: as the student reads them; rates: teacher rate that each one's rollout aims at; hidden: first
    tokens of each that the teacher does not see.
    """

    ids: list[list[int]]
    rates: list[float]
    hidden: list[int]

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, at: int, size: int) -> Prompts:
        """The `at`-th of the parts of `size`."""
        cut = slice(at * size, (at + 1) * size)
        return Prompts(self.ids[cut], self.rates[cut], self.hidden[cut])

    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.ids, self.rates]).encode()).hexdigest()


def prefix_ids(tokenizer: PreTrainedTokenizerBase, template: str | None, fraction: float) -> list[int]:
    """Token ids of the budget prompt; none where there is no template."""
    if template is None:
        return []
    return tokenizer(budget_text(template, fraction), add_special_tokens=False)["input_ids"]


def rollout_prompts(
    tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], config: GateConfig, seed: int
) -> Prompts:
    """Conditioned on a price they all aim at `config.rate`, by a prompt each at a budget of its own."""
    prompts = encode_prompts(tokenizer, list(sources))
    if config.template is None:
        return Prompts(prompts, [config.rate] * len(prompts), [0] * len(prompts))
    rates = Random(seed).choices(config.budgets, k=len(prompts))
    prefixes = {rate: prefix_ids(tokenizer, config.template, rate) for rate in config.budgets}
    return Prompts(
        [prefixes[rate] + prompt for rate, prompt in zip(rates, prompts, strict=True)],
        rates,
        [len(prefixes[rate]) for rate in rates],
    )


class Trees:
    """The closed loop of `sources` at each budget: one tree for all unless budgets stand in the prompt."""

    def __init__(
        self,
        cooperation: Cooperation,
        tokenizer: PreTrainedTokenizerBase,
        sources: Sequence[str],
        gates: dict[str, ScoreGate],
        template: str | None,
    ) -> None:
        self._cooperation, self._gates = cooperation, gates
        self._tokenizer, self._template = tokenizer, template
        self._prompts = encode_prompts(tokenizer, list(sources))
        self._trees: dict[float, Tree] = {}

    def __call__(self, budget: float) -> Tree:
        """At 0 there is nothing to say, and the prompts are as they are."""
        key = budget if self._template else 0.0
        if key not in self._trees:
            prefix = prefix_ids(self._tokenizer, self._template, key) if key else []
            prompts = [prefix + prompt for prompt in self._prompts]
            self._trees[key] = Tree(self._cooperation, prompts, self._gates, len(prefix))
        return self._trees[key]
