"""Prompts of the rollouts: as they are, or with a budget in words in front, which only the student reads."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from random import Random

from transformers import PreTrainedTokenizerBase

from measuring.chats import Source
from router.checkpoint import budget_text
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
    hidden: list[int]
    """First tokens of each that the teacher does not see."""
    sources: list[int]
    """Number of each one's source: a source that comes again has the number that it had."""

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, number: int, size: int) -> "Prompts":
        """One of the parts of `size`, by its number from 0."""
        cut = slice(number * size, (number + 1) * size)
        return Prompts(self.ids[cut], self.rates[cut], self.hidden[cut], self.sources[cut])

    def digest(self) -> str:
        """Of prompts, rates and sources."""
        return hashlib.sha256(json.dumps([self.ids, self.rates, self.sources]).encode()).hexdigest()


def prefix_ids(tokenizer: PreTrainedTokenizerBase, template: str | None, fraction: float) -> list[int]:
    """Token ids of the budget prompt; none where there is no template."""
    if template is None:
        return []
    return tokenizer(budget_text(template, fraction), add_special_tokens=False)["input_ids"]


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
        return Prompts(prompts, rates, [0] * len(prompts), numbers)
    rates = Random(seed).choices(config.budgets, k=len(prompts))
    prefixes = {rate: prefix_ids(tokenizer, config.template, rate) for rate in config.budgets}
    prefixed = Prompts([], rates, [], numbers)
    for rate, prompt in zip(rates, prompts, strict=True):
        prefix = prefixes[rate]
        prefixed.ids.append(prefix + prompt)
        prefixed.hidden.append(len(prefix))
    return prefixed


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
            prefix = prefix_ids(self._tokenizer, self._template, key) if key else []
            prompts = [prefix + prompt for prompt in self._prompts]
            self._trees[key] = Tree(self._loop, prompts, self._gates, len(prefix))
        return self._trees[key]
