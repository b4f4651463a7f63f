"""Prompts of the rollouts, as they are or with a budget in words, which only the student reads."""

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
    """The prompts of some rollouts, with the rates that these aim at."""

    ids: list[list[int]]
    """Prompts as the student reads them, as token ids."""
    rates: list[float]
    """Teacher rate that the rollout of each prompt aims at."""
    teacher_ids: list[list[int]]
    """Prompts as the teacher reads them, without budget words."""
    sources: list[int]
    """Number of each prompt's source; equal sources have the same number."""

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, number: int, size: int) -> "Prompts":
        """Part `number`, from 0, of the prompts in parts of `size`."""
        cut = slice(number * size, (number + 1) * size)
        return Prompts(self.ids[cut], self.rates[cut], self.teacher_ids[cut], self.sources[cut])

    def digest(self) -> str:
        """A digest of prompts, rates and sources."""
        return hashlib.sha256(json.dumps([self.ids, self.rates, self.sources]).encode()).hexdigest()


def rollout_prompts(
    tokenizer: PreTrainedTokenizerBase, sources: Sequence[Source], config: GateConfig, seed: int
) -> Prompts:
    """The prompts of some sources, with their rates.

    All rates are the recipe's `rate`. With a constrained objective, they are the recipe's budgets in turn.
    With budgets in words, each prompt draws one of the budgets at random, and has it in words.
    """
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
    """The tree of `sources` for each budget: the same tree for all budgets, unless prompts have budget words.

    Args:
        loop: the pair.
        tokenizer: the tokenizer of the pair.
        sources: the sources of the prompts.
        gates: the gates that score the trees' nodes, by name.
        template: the template of the budget words; None: prompts have none.
    """

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
        """Add a gate to all trees; a gate of the same name is replaced."""
        self._gates[name] = gate
        for tree in self._trees.values():
            tree.add(name, gate)

    def __call__(self, budget: float) -> Tree:
        """The tree for a budget. At budget 0, prompts have no budget words."""
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
