"""A dual variable for every budget: the price at which the policy spends the budget on average.

The constraint is E[teacher tokens] = budget * E[tokens]. Its dual variable rises by what was spent too much
(dual ascent). Scores are spread over orders of magnitude, and so are prices. So the step is taken in the
share of positions whose score is above the price: that share is what the rate depends on, in any unit.
A budget above what the gate would spend for nothing has a negative price.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from training.gating.calibration import teacher_rate
from training.gating.rollout import FREE, Rollout
from training.gating.tree import Setting, Tree

RECENT = 100_000
"""Positions whose scores the prices of the next rollouts are quantiles of."""
SETTLING = 12
"""Steps of dual ascent with a gate that does not change any more."""


def wanted_rate(completions: Sequence[Rollout]) -> float:
    """Teacher tokens / completion tokens that the policy itself would have spent, exploration apart.

    Decisions are taken outside spans. If a share p of them is to ask, and a call brings n tokens, the rate is
    p n / (p n + 1 - p).
    """
    decisions = 0
    wanted = 0
    calls = 0
    teacher_tokens = 0
    for completion in completions:
        starts = set(completion.starts)
        calls += len(starts)
        teacher_tokens += completion.teacher_tokens
        for place, (wants, by_teacher) in enumerate(
            zip(completion.wanted, completion.by_teacher, strict=True)
        ):
            if place in starts or not by_teacher:
                decisions += 1
                wanted += wants
    spent = wanted * (teacher_tokens / calls if calls else 1.0)
    return spent / (spent + decisions - wanted) if decisions else 0.0


def asking_share(rate: float, tokens: int) -> float:
    """Share of the decisions that has to be to ask for a rate, if a call brings this many tokens."""
    return rate / (tokens * (1 - rate) + rate)


def asking_price(scores: Tensor, rate: float, tokens: int) -> float:
    """The price for a rate by the quantiles of scores (N,), as if asking did not change what comes next."""
    return torch.quantile(scores, 1 - asking_share(rate, tokens)).item()


def ascended(
    price: float, realised: float, budget: float, scores: Tensor, step: float = 1.0, tokens: int = 1
) -> float:
    """One step of dual ascent.

    Args:
        price: that `realised` was measured at.
        realised: rate.
        budget: rate that is wanted.
        scores: (N,) of the gate as it is now.
        step: 1 corrects all of the error at once.
        tokens: of a call.
    """
    too_much = asking_share(realised, tokens) - asking_share(budget, tokens)
    above = (scores > price).double().mean().item() - step * too_much
    return torch.quantile(scores.double(), 1 - min(max(above, 0.0), 1.0)).item()


class Settling(NamedTuple):
    """A step of dual ascent."""

    realised: dict[float, float]
    """Rates at the prices before it, by budget."""
    prices: dict[float, float]
    """After it."""


def settling(tree: Tree, gate: str, prices: Mapping[float, float], ask_tokens: int) -> Iterator[Settling]:
    """Steps of dual ascent on the greedy completions of a tree's prompts, without a bucket.

    Rollouts of a round are few for each budget, and with the gate the rates move. Here nothing is drawn.
    """
    scores = tree.scores(gate)  # as they are now: the tree grows meanwhile
    for number in range(1, SETTLING + 1):
        runs = tree.run([Setting(gate, price, FREE, ask_tokens) for price in prices.values()])
        realised = dict(zip(prices, map(teacher_rate, runs), strict=True))
        moved = {}
        for budget, price in prices.items():
            step = number**-0.5
            moved[budget] = ascended(price, realised[budget], budget, scores, step, ask_tokens)
        prices = moved
        yield Settling(realised, prices)
