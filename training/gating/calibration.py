"""Measures the prices of each budget in the closed loop on validation data, under the bucket of that budget.

The price aims at a mean teacher rate that equals the fraction, unless that costs quality. To spend a tight
bucket to its mean, a gate must empty it on trifles. Then the bucket is empty when it matters (docs/log.md).
The spare price spends the rest of a fraction, for users who want a rate and not a bound.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import add

import torch
from torch import Tensor

from training.gating.rollout import Rollout
from training.gating.tree import Setting, Tree

Run = Sequence[Rollout]
"""The completions of one setting, one for each prompt."""
Quality = Callable[[Run], float]
"""Quality of a run."""
Noise = Callable[[Run, Run], float]
"""Standard error of the difference between two runs' qualities, in the same unit."""

SHARES = (
    0.0,
    0.3,
    0.5,
    0.6,
    0.7,
    0.75,
    0.8,
    0.84,
    0.87,
    0.89,
    0.91,
    0.93,
    0.945,
    0.96,
    0.97,
    0.98,
    0.99,
    0.997,
)
"""Shares of positions whose scores are below the prices that the aim is compared with.

They are close to each other near 1, where asking is rare.
"""
TOLERANCE = 0.02
"""Least gain in quality for leaving the aim, as a share of the gap between student and teacher."""
ERRORS = 2.0
"""Least gain in quality for leaving the aim, in standard errors of the gain."""
ROUNDS = 12
"""Number of bisections."""


def teacher_rate(completions: Sequence[Rollout]) -> float:
    """Teacher tokens / completion tokens, over all completions together."""
    by_teacher = 0
    tokens = 0
    for completion in completions:
        by_teacher += completion.teacher_tokens
        tokens += len(completion.tokens)
    return by_teacher / tokens


def standard_error(differences: Tensor) -> float:
    """Standard error of the mean of differences (N,); inf if N < 2, because one shows no spread."""
    if len(differences) < 2:
        return math.inf
    return differences.std().item() / math.sqrt(len(differences))


def no_noise(_first: Run, _second: Run) -> float:
    """No noise at all, so that every difference in quality counts."""
    return 0.0


def calibrate(
    tree: Tree,
    gate: str,
    budgets: Sequence[float],
    spans: tuple[int, int],
    quality: Quality,
    noise: Noise = no_noise,
    others: Sequence[float] = (),
) -> list[tuple[float, float]]:
    """(fraction, price) for each budget; prices do not rise with the fraction.

    Args:
        tree: the tree of the validation prompts.
        gate: name of a gate that the tree scores.
        budgets: fractions, in increasing order.
        spans: (span_tokens, ask_tokens) of the bucket.
        quality: quality of a run, in units of the gap between student and teacher.
        noise: standard error of a difference in quality, in the same unit.
        others: further prices to compare the aim with.
    """
    scores = tree.scores(gate).double()
    common = [*others, *torch.quantile(scores, torch.tensor(SHARES, dtype=torch.float64)).tolist()]
    choices = []
    for budget, aim in zip(budgets, price_at_rate(tree, gate, budgets, spans), strict=True):
        runs = tree.run([Setting(gate, price, budget, *spans) for price in (aim, *common)])
        qualities = []
        for run in runs:
            qualities.append(quality(run) if teacher_rate(run) <= budget else -1.0)
        best = qualities.index(max(qualities))
        needed = max(TOLERANCE, ERRORS * noise(runs[0], runs[best]))
        price = aim if qualities[0] >= qualities[best] - needed else (aim, *common)[best]
        choices.append(PricePool([budget], price, qualities[1:]))
    points = []
    for choice in not_rising(choices, common):
        points += [(budget, choice.price) for budget in choice.budgets]
    return points


@dataclass(frozen=True)
class PricePool:
    """Neighbouring budgets that share one price."""

    budgets: list[float]
    price: float
    qualities: list[float]
    """Quality at each of the common prices, which all pools share; summed over the budgets."""


def not_rising(choices: Sequence[PricePool], common: Sequence[float]) -> list[PricePool]:
    """The choices, pooled so that prices do not rise with the budget.

    If a price is above that of the budget before it, both budgets get the common price that is best for
    both. It is the pool of adjacent violators (Ayer et al. 1955) with quality in place of squares.

    Args:
        choices: a choice for each budget, in increasing order of the budgets.
        common: the common prices, at which the choices have their qualities.
    """
    pools: list[PricePool] = []
    for choice in choices:
        pool = choice
        while pools and pools[-1].price < pool.price:
            before = pools.pop()
            qualities = list(map(add, before.qualities, pool.qualities))
            price = common[qualities.index(max(qualities))]
            pool = PricePool([*before.budgets, *pool.budgets], price, qualities)
        pools.append(pool)
    return pools


def spare_prices(
    tree: Tree, gate: str, points: Sequence[tuple[float, float]], spans: tuple[int, int]
) -> list[tuple[float, float]]:
    """(fraction, spare price) for each of `points`, see `router.policy.Policy`.

    With the spare price, the realised rate is the fraction. If the plain price already has this rate, the
    spare price is the plain one.
    """
    fractions, prices = zip(*points, strict=True)

    def setting(number: int, spare: float) -> Setting:
        return Setting(gate, prices[number], fractions[number], *spans, spare=spare)

    spares = map(min, prices, _bisect(tree, gate, fractions, setting))
    falling = list(accumulate(reversed(list(spares)), max))[::-1]
    return list(zip(fractions, falling, strict=True))


def price_at_rate(tree: Tree, gate: str, rates: Sequence[float], spans: tuple[int, int]) -> list[float]:
    """For each rate the lowest price that realises no more than it, to 1 / 2^ROUNDS of all scores."""

    def setting(number: int, price: float) -> Setting:
        return Setting(gate, price, rates[number], *spans)

    return _bisect(tree, gate, rates, setting)


def _bisect(
    tree: Tree, gate: str, rates: Sequence[float], setting: Callable[[int, float], Setting]
) -> list[float]:
    """For each rate the lowest price whose setting realises no more than it.

    The bisection is over the quantiles of the tree's scores: on average, the rate falls as the price rises.
    """
    scores = tree.scores(gate).double()  # kept, because the tree grows in the meantime
    # Shares of positions whose scores are below the price.
    low = [0.0] * len(rates)
    high = [1.0] * len(rates)
    for _ in range(ROUNDS):
        middle = list(map(_mean, low, high))
        settings = []
        for i, share in enumerate(middle):
            settings.append(setting(i, torch.quantile(scores, share).item()))
        for i, completions in enumerate(tree.run(settings)):
            if teacher_rate(completions) > rates[i]:
                low[i] = middle[i]
            else:
                high[i] = middle[i]
    return [torch.quantile(scores, share).item() for share in high]


def _mean(low: float, high: float) -> float:
    return (low + high) / 2
