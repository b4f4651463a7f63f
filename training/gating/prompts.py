"""Prompts of the rollouts: as they are, or with a budget in words in front of them, which only the student
reads.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from transformers import PreTrainedTokenizerBase

from router.checkpoint import budget_text
from training.gating.config import GateConfig, PriceConditioning
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

    def part(self, at: int, size: int) -> "Prompts":
        """The `at`-th of the parts of `size`."""
        cut = slice(at * size, (at + 1) * size)
        return Prompts(self.ids[cut], self.rates[cut], self.hidden[cut], self.sources[cut])

    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.ids, self.rates, self.sources]).encode()).hexdigest()


def prefix_ids(tokenizer: PreTrainedTokenizerBase, template: str | None, fraction: float) -> list[int]:
    """Token ids of the budget prompt; none where there is no template."""
    if template is None:
        return []
    return tokenizer(budget_text(template, fraction), add_special_tokens=False)["input_ids"]


def rollout_prompts(
    tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], config: GateConfig, seed: int
) -> Prompts:
    """Conditioned on a price they all aim at one rate, by words each at a budget of its own."""
    prompts = encode_prompts(tokenizer, list(sources))
    numbers = {source: number for number, source in enumerate(dict.fromkeys(sources))}
    numbered = [numbers[source] for source in sources]
    if isinstance(config.conditioning, PriceConditioning):
        rates = [config.conditioning.rate] * len(prompts)
        return Prompts(prompts, rates, [0] * len(prompts), numbered)
    rates = Random(seed).choices(config.budgets, k=len(prompts))
    prefixes = {rate: prefix_ids(tokenizer, config.template, rate) for rate in config.budgets}
    return Prompts(
        [prefixes[rate] + prompt for rate, prompt in zip(rates, prompts, strict=True)],
        rates,
        [len(prefixes[rate]) for rate in rates],
        numbered,
    )


class Trees:
    """The closed loop of `sources` at each budget: one tree for all unless budgets stand in the prompt."""

    def __init__(
        self,
        loop: ClosedLoop,
        tokenizer: PreTrainedTokenizerBase,
        sources: Sequence[str],
        gates: dict[str, ScoreGate],
        template: str | None,
    ) -> None:
        self._loop, self._gates = loop, gates
        self._tokenizer, self._template = tokenizer, template
        self._prompts = encode_prompts(tokenizer, list(sources))
        self._trees: dict[float, Tree] = {}

    def __call__(self, budget: float) -> Tree:
        """At 0 there is nothing to say, and the prompts are as they are."""
        key = budget if self._template else 0.0
        if key not in self._trees:
            prefix = prefix_ids(self._tokenizer, self._template, key) if key else []
            prompts = [prefix + prompt for prompt in self._prompts]
            self._trees[key] = Tree(self._loop, prompts, self._gates, len(prefix))
        return self._trees[key]
