"""A dual variable for every budget: the price at which the policy spends the budget on average.

The constraint is E[teacher tokens] = budget * E[tokens]. Dual ascent raises the price if too much was spent,
and lowers it if too little was. Scores are spread over orders of magnitude, and so are prices. Therefore a
step changes the share of positions whose score is above the price: the rate depends on this share, in any
unit. If a budget is more than the gate spends at price 0, its price is negative.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from training.gating.calibration import teacher_rate
from training.gating.rollout import FREE, Rollout
from training.gating.tree import Setting, Tree

RECENT = 100_000
"""Number of latest positions, whose scores give the prices of the next rollouts as quantiles."""
SETTLING = 12
"""Number of steps of dual ascent with a gate that no longer changes."""


def wanted_rate(completions: Sequence[Rollout]) -> float:
    """The teacher rate (teacher tokens / completion tokens) of the policy itself, without exploration.

    The gate decides at positions outside spans. If it asks at a share p of them, and a call has n tokens, the
    rate is p n / (p n + 1 - p). Walks in a tree do not explore: they asked wherever the policy may ask.
    """
    decisions = 0
    wanted = 0
    calls = 0
    teacher_tokens = 0
    for completion in completions:
        starts = set(completion.starts)
        calls += len(starts)
        teacher_tokens += completion.teacher_tokens
        wishes = completion.wanted or [place in starts for place in range(len(completion.tokens))]
        for place, (wants, by_teacher) in enumerate(zip(wishes, completion.by_teacher, strict=True)):
            if place in starts or not by_teacher:
                decisions += 1
                wanted += wants
    spent = wanted * (teacher_tokens / calls if calls else 1.0)
    return spent / (spent + decisions - wanted) if decisions else 0.0


def asking_share(rate: float, tokens: int) -> float:
    """The share of decisions at which a gate must ask to realise a teacher rate.

    Args:
        rate: the teacher rate.
        tokens: number of tokens in a call.
    """
    return rate / (tokens * (1 - rate) + rate)


def asking_price(scores: Tensor, rate: float, tokens: int) -> float:
    """The price that realises a rate on scores (N,), as if asking did not change the later positions.

    Args:
        scores: (N,), the gate's scores.
        rate: the teacher rate.
        tokens: number of tokens in a call.
    """
    return torch.quantile(scores, 1 - asking_share(rate, tokens)).item()


def ascended(
    price: float, realised: float, budget: float, scores: Tensor, step: float = 1.0, tokens: int = 1
) -> float:
    """The price after one step of dual ascent.

    Args:
        price: the price at which `realised` was measured.
        realised: the realised teacher rate.
        budget: the wanted teacher rate.
        scores: (N,), scores of the present gate.
        step: share of the error to correct; 1 corrects all of it.
        tokens: number of tokens in a call.
    """
    too_much = asking_share(realised, tokens) - asking_share(budget, tokens)
    above = (scores > price).double().mean().item() - step * too_much
    return torch.quantile(scores.double(), 1 - min(max(above, 0.0), 1.0)).item()


class Settling(NamedTuple):
    """A step of dual ascent."""

    realised: dict[float, float]
    """Realised rates by budget, at the prices before the step."""
    prices: dict[float, float]
    """Prices by budget after the step."""


def settling(tree: Tree, gate: str, prices: Mapping[float, float], ask_tokens: int) -> Iterator[Settling]:
    """Steps of dual ascent on the greedy completions of a tree's prompts, without a bucket.

    In a round, each budget has few rollouts, and the rates change with the gate. Here the gate is fixed, and
    nothing is drawn at random.
    """
    scores = tree.scores(gate)  # kept, because the tree grows in the meantime
    for number in range(1, SETTLING + 1):
        runs = tree.run([Setting(gate, price, FREE, ask_tokens) for price in prices.values()])
        realised = dict(zip(prices, map(teacher_rate, runs), strict=True))
        moved = {}
        for budget, price in prices.items():
            step = number**-0.5
            moved[budget] = ascended(price, realised[budget], budget, scores, step, ask_tokens)
        prices = moved
        yield Settling(realised, prices)
