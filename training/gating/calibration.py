"""The prices of each budget, measured in the closed loop on validation data, under the bucket of that budget.

The price aims at the mean teacher rate that equals the fraction, unless that costs quality: a tight bucket
can only be spent to its mean by emptying it on trifles, and then it is empty when it matters (docs/log.md).
The spare price spends the rest of a fraction, for those who want a rate and not a bound.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from training.gating.rollout import Rollout
from training.gating.tree import Setting, Tree

Run = Sequence[Rollout]
Quality = Callable[[Run], float]
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
"""Shares of positions below the prices that the aim is compared with: fine where asking is rare."""
TOLERANCE = 0.02
"""Share of the gap between student and teacher that is not worth leaving the aim for."""
ERRORS = 2.0
"""Standard errors that the best of all those prices has to be better by."""
ROUNDS = 12


def teacher_rate(completions: Sequence[Rollout]) -> float:
    """Teacher tokens / completion tokens, over all of them together."""
    return sum(c.teacher_tokens for c in completions) / sum(len(c.tokens) for c in completions)


def calibrate(
    tree: Tree,
    gate: str,
    budgets: Sequence[float],
    spans: tuple[int, int],
    quality: Quality,
    noise: Noise = lambda one, other: 0.0,
) -> list[tuple[float, float]]:
    """(fraction, price) for each of the increasing budgets; prices do not increase.

    spans: (span_tokens, ask_tokens) of the bucket. quality, noise: in units of the gap between
    student and teacher.
    """
    scores = tree.scores(gate).double()
    points: list[tuple[float, float]] = []
    for budget, aim in zip(budgets, price_at_rate(tree, gate, budgets, spans), strict=True):
        prices = [aim, *torch.quantile(scores, torch.tensor(SHARES, dtype=torch.float64)).tolist()]
        runs = tree.run([Setting(gate, price, budget, *spans) for price in prices])
        qualities = [quality(run) if teacher_rate(run) <= budget else -1.0 for run in runs]
        best = qualities.index(max(qualities))
        needed = max(TOLERANCE, ERRORS * noise(runs[0], runs[best]))
        price = aim if qualities[0] >= qualities[best] - needed else prices[best]
        points.append((budget, min(price, points[-1][1]) if points else price))
    return points


def spare_prices(
    tree: Tree, gate: str, points: Sequence[tuple[float, float]], spans: tuple[int, int]
) -> list[tuple[float, float]]:
    """(fraction, spare price that makes it the realised rate) for each of `points`, see
    `router.policy.Policy`; where the plain price realises the fraction already, it is that one.
    """
    fractions = [fraction for fraction, _ in points]
    found = _bisect(
        tree,
        gate,
        fractions,
        lambda at, spare: Setting(gate, points[at][1], fractions[at], *spans, spare=spare),
    )
    spares = [min(price, spare) for (_, price), spare in zip(points, found, strict=True)]
    falling = list(accumulate(reversed(spares), max))[::-1]
    return list(zip(fractions, falling, strict=True))


def price_at_rate(tree: Tree, gate: str, rates: Sequence[float], spans: tuple[int, int]) -> list[float]:
    """The lowest price, to 1 / 2^ROUNDS of all scores, that realises no more than each rate."""
    return _bisect(tree, gate, rates, lambda at, price: Setting(gate, price, rates[at], *spans))


def _bisect(
    tree: Tree, gate: str, rates: Sequence[float], setting: Callable[[int, float], Setting]
) -> list[float]:
    """For each rate the lowest price whose setting realises no more than it.

    Over the quantiles of the scores in the tree: more asking raises the realised rate on average.
    """
    scores = tree.scores(gate).double()  # as they are now: the tree grows meanwhile
    low, high = [0.0] * len(rates), [1.0] * len(rates)  # shares of positions that lie under the price
    for _ in range(ROUNDS):
        middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
        settings = [setting(i, torch.quantile(scores, share).item()) for i, share in enumerate(middle)]
        for i, completions in enumerate(tree.run(settings)):
            if teacher_rate(completions) > rates[i]:
                low[i] = middle[i]
            else:
                high[i] = middle[i]
    return [torch.quantile(scores, share).item() for share in high]
