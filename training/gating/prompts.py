"""Prompts of the rollouts: as they are, or with a budget in words, which only the student reads."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from random import Random

from transformers import PreTrainedTokenizerBase

from measuring.chats import Source, with_words
from router.words import budget_text
from training.gate_config import ConstrainedObjective, GateConfig, PriceConditioning
from training.gating.rollout import ClosedLoop
from training.gating.tree import ScoreGate, Tree
from training.tokenizer import encode_prompts


@dataclass(frozen=True)
class Prompts:
    """Of rollouts."""

    ids: list[list[int]]
    """As the student reads them."""
    rates: list[float]
    """Teacher rate that each one's rollout aims at."""
    teacher_ids: list[list[int]]
    """As the teacher reads them: without the words."""
    sources: list[int]
    """Number of each one's source: a source that comes again has the number that it had."""

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, number: int, size: int) -> "Prompts":
        """One of the parts of `size`, by its number from 0."""
        cut = slice(number * size, (number + 1) * size)
        return Prompts(self.ids[cut], self.rates[cut], self.teacher_ids[cut], self.sources[cut])

    def digest(self) -> str:
        """Of prompts, rates and sources."""
        return hashlib.sha256(json.dumps([self.ids, self.rates, self.sources]).encode()).hexdigest()


def rollout_prompts(
    tokenizer: PreTrainedTokenizerBase, sources: Sequence[Source], config: GateConfig, seed: int
) -> Prompts:
    """Their rates are the recipe's, or budgets: in turn if the objective is constrained, drawn with words."""
    prompts = encode_prompts(tokenizer, list(sources))
    known: dict[Source, int] = {}
    numbers = []
    for source in sources:
        known.setdefault(source, len(known))
        numbers.append(known[source])
    if isinstance(config.conditioning, PriceConditioning):
        aims = [config.conditioning.rate]
        if isinstance(config.objective, ConstrainedObjective):
            aims = list(config.budgets)
        rates = list(islice(cycle(aims), len(prompts)))
        return Prompts(prompts, rates, prompts, numbers)
    rates = Random(seed).choices(config.budgets, k=len(prompts))
    worded = [
        with_words(source, budget_text(config.conditioning.words, rate))
        for source, rate in zip(sources, rates, strict=True)
    ]
    return Prompts(encode_prompts(tokenizer, worded), rates, prompts, numbers)


class Trees:
    """The closed loop of `sources` at each budget: one tree for all unless budgets are in the prompt."""

    def __init__(
        self,
        loop: ClosedLoop,
        tokenizer: PreTrainedTokenizerBase,
        sources: Sequence[Source],
        gates: Mapping[str, ScoreGate],
        template: str | None,
    ) -> None:
        self._loop = loop
        self._gates = dict(gates)
        self._tokenizer = tokenizer
        self._template = template
        self._sources = sources
        self._prompts = encode_prompts(tokenizer, list(sources))
        self._trees: dict[float, Tree] = {}

    def add(self, name: str, gate: ScoreGate) -> None:
        """To all trees; a gate of the same name is replaced."""
        self._gates[name] = gate
        for tree in self._trees.values():
            tree.add(name, gate)

    def __call__(self, budget: float) -> Tree:
        """At 0 there is nothing to say, and the prompts are as they are."""
        key = budget if self._template else 0.0
        if key not in self._trees:
            prompts = self._prompts
            if self._template and key:
                words = budget_text(self._template, key)
                prompts = encode_prompts(
                    self._tokenizer, [with_words(source, words) for source in self._sources]
                )
            self._trees[key] = Tree(self._loop, prompts, self._gates, self._prompts)
        return self._trees[key]
