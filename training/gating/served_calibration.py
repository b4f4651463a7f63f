"""Finds the prices of the budgets with a running gateway, by the rates that they realise on validation data.

The first price of a budget is a quantile of the gate's scores, at the share of positions that the budget
needs. The gateway gets the router with these prices, and answers the prompts under each budget's bucket. If
the realised rate differs from the budget, the share is corrected, and the gateway gets the router again.

A price that spends the whole budget may spend it on trifles. So if replies can be scored, each budget is also
tried at the prices of smaller budgets, until quality gets worse. A clearly better price is taken. If prices
would then rise with the budget, neighbouring budgets share the price that is best for all of them.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from measuring.chats import Source
from measuring.gateway import GatewayError
from router.checkpoint import Points
from training.gating.calibration import ERRORS, TOLERANCE, PricePool, not_rising, standard_error
from training.gating.duals import asking_share
from training.loop.progress import console
from training.running_gateway import RunningGateway

PASSES = 5
"""Most passes over the prompts for each budget, to find a price that spends it."""
HIGHER = 4
"""Most passes at the prices of smaller budgets; each pass takes the price of the next smaller budget."""
NEAR = 0.1
"""Largest error of the realised rate, as a share of the budget; at least `LEAST` and at most `MOST`."""
LEAST = 0.003
MOST = 0.01
STEP = 4.0
"""Largest factor by which a share changes between two passes."""
TOGETHER = 50
"""Prompts sent at every budget before the next prompts, so that engines with prefix caches read each once."""

Qualities = Callable[[int, list[str]], list[float]]
"""Computes the quality, in [0, 1], of the answers to consecutive prompts, from the first prompt's number."""


class Found(NamedTuple):
    """The prices of the budgets; no price is above that of a smaller budget."""

    prices: Points
    spares: Points
    """The prices that spend the whole budgets."""


class MeasuredReplies(NamedTuple):
    """Counts and qualities of the replies to the first prompts, or to all, at one budget and price."""

    replies: int = 0
    """Number of replies."""
    tokens: int = 0
    """Number of tokens in all replies."""
    teacher_tokens: int = 0
    """Number of these tokens that the teacher wrote."""
    qualities: tuple[float, ...] = ()
    """Quality of each reply; empty if replies are not scored."""

    @property
    def rate(self) -> float:
        """The realised teacher rate."""
        return self.teacher_tokens / self.tokens

    def then(self, more: "MeasuredReplies") -> "MeasuredReplies":
        """These replies together with those to the next prompts."""
        return MeasuredReplies(
            self.replies + more.replies,
            self.tokens + more.tokens,
            self.teacher_tokens + more.teacher_tokens,
            self.qualities + more.qualities,
        )


NOTHING = MeasuredReplies()
Kept = dict[tuple[float, float], MeasuredReplies]
"""The replies so far, by (budget, price)."""


class Pass(NamedTuple):
    """One pass over all prompts at one budget and price."""

    share: float
    """Share of the scores that are above the price."""
    price: float
    rate: float
    """Realised teacher rate."""


@dataclass
class Search:
    """The search for the price that spends one budget."""

    budget: float
    share: float
    """Share of positions whose scores are above the next price."""
    passes: list[Pass] = field(default_factory=list)

    @property
    def is_settled(self) -> bool:
        """Whether the search has ended: a pass was near enough, or there were `PASSES`."""
        return len(self.passes) >= PASSES or any(map(self._is_near, self.passes))

    @property
    def best(self) -> Pass:
        """The pass whose rate is nearest to the budget."""
        return min(self.passes, key=lambda tried: abs(tried.rate - self.budget))

    def saw(self, tried: Pass) -> None:
        """Add a pass, and choose the next share."""
        self.passes.append(tried)
        below = [seen for seen in self.passes if seen.rate < self.budget]
        above = [seen for seen in self.passes if seen.rate >= self.budget]
        if below and above:
            low = max(below, key=lambda seen: seen.rate)
            high = min(above, key=lambda seen: seen.rate)
            part = (self.budget - low.rate) / (high.rate - low.rate)
            self.share = low.share + part * (high.share - low.share)
        else:
            factor = asking_share(self.budget, 1) / max(asking_share(tried.rate, 1), 1e-9)
            self.share = min(1.0, tried.share * min(max(factor, 1 / STEP), STEP))

    def _is_near(self, tried: Pass) -> bool:
        return abs(tried.rate - self.budget) <= min(max(NEAR * self.budget, LEAST), MOST)


@dataclass(frozen=True)
class ServedCalibration:
    """The calibration of one router with a running gateway."""

    gateway: RunningGateway
    sources: Sequence[Source]
    """Sources of the validation examples."""
    budgets: Sequence[float]
    """Fractions, in increasing order."""
    ask_tokens: int
    """Number of tokens in one call."""
    scores: Tensor
    """(N,) scores of the gate."""
    put: Callable[[Found], None]
    """Gives the gateway the router with these prices."""
    file: Path
    """File of the replies so far; a stopped run resumes after the last of them."""
    qualities: Qualities | None = None
    """Scores replies; None: prices are chosen by the realised rate alone."""

    def found(self) -> Found:
        """Find the prices of all budgets. Afterwards the gateway serves with them.

        Raises:
            GatewayError: the gateway cannot be used.
        """
        kept = self._kept()
        spending = self._spending(kept)
        chosen = spending if self.qualities is None else self._better(spending, kept)
        prices = list(zip(self.budgets, chosen, strict=True))
        found = Found(prices, list(zip(self.budgets, spending, strict=True)))
        self.put(found)
        for budget, price in prices:
            measured = kept.get((budget, price))
            rate = "" if measured is None else f", rate {measured.rate:.3f}"
            console.print(f"router: budget {budget:g} has price {price:.4g}{rate}")
        return found

    def _spending(self, kept: Kept) -> list[float]:
        """The price of each budget that spends it."""
        searches = []
        for budget in self.budgets:
            searches.append(Search(budget, asking_share(budget, self.ask_tokens)))
        for number in range(1, PASSES + 1):
            prices = self._prices(searches)
            waiting = [search for search in searches if not search.is_settled]
            if not waiting:
                break
            self._measure(
                [search.budget for search in waiting], prices, kept, f"router: prices, pass {number}"
            )
            for search in waiting:
                price = prices[search.budget]
                search.saw(Pass(self._share_above(price), price, kept[search.budget, price].rate))
        return list(self._prices(searches).values())

    def _better(self, spending: Sequence[float], kept: Kept) -> list[float]:
        """For each budget, the price that spends it, or a higher price that is clearly better."""
        least = TOLERANCE * self._gap(kept)
        best = list(spending)
        self._measure(self.budgets, self._by_budget(spending), kept, "router: found prices")
        going = list(range(len(spending)))
        for step in range(1, HIGHER + 1):
            going = [number for number in going if number >= step]
            shifted = [spending[max(number - step, 0)] for number in range(len(spending))]
            budgets = [self.budgets[number] for number in going]
            self._measure(budgets, self._by_budget(shifted), kept, f"router: higher prices, step {step}")
            for number in list(going):
                budget = self.budgets[number]
                before = fmean(kept[budget, best[number]].qualities)
                if fmean(kept[budget, shifted[number]].qualities) < before:
                    going.remove(number)
                else:
                    best[number] = shifted[number]
        choices = []
        for budget, own, price in zip(self.budgets, spending, best, strict=True):
            gains = _tensor(kept[budget, price].qualities) - _tensor(kept[budget, own].qualities)
            clearly = gains.mean().item() > max(least, ERRORS * standard_error(gains))
            qualities = [self._quality(kept, budget, other) for other in spending]
            choices.append(PricePool([budget], price if clearly else own, qualities))
        chosen = []
        for choice in not_rising(choices, spending):
            chosen += [choice.price] * len(choice.budgets)
        return chosen

    @staticmethod
    def _quality(kept: Kept, budget: float, price: float) -> float:
        """Mean quality over all prompts; -inf if this budget was not tried at this price."""
        measured = kept.get((budget, price))
        return -math.inf if measured is None else fmean(measured.qualities)

    def _gap(self, kept: Kept) -> float:
        """Gap between the mean qualities of student and teacher alone; 1 if the teacher is not better."""
        alone = (0.0, 0.0)
        teacher = (1.0, 0.0)
        self._ask([alone, teacher], kept, "router: both models alone")
        gap = fmean(kept[teacher].qualities) - fmean(kept[alone].qualities)
        return gap if gap > 0 else 1.0

    def _measure(self, budgets: Sequence[float], prices: dict[float, float], kept: Kept, name: str) -> None:
        """Measure all prompts at these budgets, except for replies that are kept already.

        Args:
            budgets: the budgets to measure.
            prices: the prices of all budgets, which the gateway gets.
            kept: the replies so far; new ones are added.
            name: title of the progress bar.
        """
        points = [(budget, prices[budget]) for budget in budgets]
        if all(self._is_whole(kept, point) for point in points):
            return
        put = list(prices.items())
        self.put(Found(put, put))
        self._ask(points, kept, name)

    def _is_whole(self, kept: Kept, point: tuple[float, float]) -> bool:
        return kept.get(point, NOTHING).replies == len(self.sources)

    def _ask(self, points: Sequence[tuple[float, float]], kept: Kept, name: str) -> None:
        """Send the missing prompts at these (budget, price) points; the gateway has the prices already."""
        parts = []
        for first in range(0, len(self.sources), TOGETHER):
            parts += [(first, point) for point in points if kept.get(point, NOTHING).replies <= first]
        if not parts:
            return
        for first, point in track(parts, name, console=console):
            kept[point] = kept.get(point, NOTHING).then(self._answered(first, point[0]))
            self._keep(kept)

    def _prices(self, searches: Sequence[Search]) -> dict[float, float]:
        """By budget, the price found, or else the price to try next; none is above a smaller budget's."""
        prices = []
        for search in searches:
            prices.append(search.best.price if search.is_settled else self._price_at(search.share))
        return self._by_budget(list(accumulate(prices, min)))

    def _by_budget(self, prices: Sequence[float]) -> dict[float, float]:
        return dict(zip(self.budgets, prices, strict=True))

    def _price_at(self, share: float) -> float:
        return torch.quantile(self.scores.double(), 1 - share).item()

    def _share_above(self, price: float) -> float:
        return (self.scores.double() > price).double().mean().item()

    def _answered(self, first: int, budget: float) -> MeasuredReplies:
        """The gateway's replies to `TOGETHER` prompts, from number `first` on, at its present price."""
        replies = self.gateway.replies(self.sources[first : first + TOGETHER], budget)
        if any(reply.clamped for reply in replies):
            raise GatewayError(
                f"the gateway at {self.gateway.url}: the API key's maximum is below the budget {budget:g}"
            )
        lost = sum(reply.degraded for reply in replies)
        if lost:
            console.print(
                f"router: the teacher was lost in {lost} of {len(replies)} completions at budget {budget:g}"
            )
        scored = [] if self.qualities is None else self.qualities(first, [reply.text for reply in replies])
        return MeasuredReplies(
            len(replies),
            sum(len(reply.token_ids) for reply in replies),
            sum(reply.teacher_tokens for reply in replies),
            tuple(scored),
        )

    def _kept(self) -> Kept:
        if not self.file.exists():
            return {}
        kept = {}
        for row in json.loads(self.file.read_text()):
            replies, tokens, teacher_tokens, qualities = row["measured"]
            kept[row["budget"], row["price"]] = MeasuredReplies(
                replies, tokens, teacher_tokens, tuple(qualities)
            )
        return kept

    def _keep(self, kept: Kept) -> None:
        """Write the replies so far to the file, atomically."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.file.with_suffix(".tmp")
        rows = []
        for (budget, price), measured in kept.items():
            rows.append({"budget": budget, "price": price, "measured": measured})
        scratch.write_text(json.dumps(rows))
        os.replace(scratch, self.file)


def passes_of(budgets: int) -> int:
    """Most passes over all prompts for this many budgets, including those of student and teacher alone."""
    return budgets * (PASSES + HIGHER) + 2


def _tensor(qualities: Sequence[float]) -> Tensor:
    return torch.tensor(qualities, dtype=torch.float64)
