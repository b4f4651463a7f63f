"""The prices of the budgets, found with a running gateway: what a price realises on validation prompts.

A price is first a quantile of the gate's scores: at the share of positions that a budget needs. The router
goes to the gateway with these prices, and the gateway answers the prompts under each budget's bucket. Where
another rate comes out, the share is corrected, and the router goes there again.

A price that spends the whole budget may spend it on trifles. So where replies can be scored, each budget is
tried at the prices of smaller ones too, as long as that gets no worse. If one is clearly better, it is taken.
Where prices would then rise with the budget, neighbouring budgets share the one that is best for all of them.
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
"""Most passes over the prompts for each budget, in which a price is found that spends it."""
HIGHER = 4
"""Most passes at prices of smaller budgets, and so at most this many budgets below."""
NEAR = 0.1
"""Share of a budget by which the realised rate may miss it, within `LEAST` and `MOST`."""
LEAST = 0.003
MOST = 0.01
STEP = 4.0
"""A share is multiplied or divided by no more than this."""
TOGETHER = 50
"""Prompts that are asked at every budget before the next ones: engines that keep prefixes read each once."""

Qualities = Callable[[int, list[str]], list[float]]
"""Number of a prompt, and the answers to it and to the prompts after it -> of each answer, in [0, 1]."""


class Found(NamedTuple):
    """The prices of the budgets; none is above that of a smaller budget."""

    prices: Points
    spares: Points
    """Those that spend the whole budget."""


class MeasuredReplies(NamedTuple):
    """The replies to the first prompts, or to all of them, at one budget and price."""

    replies: int = 0
    tokens: int = 0
    teacher_tokens: int = 0
    qualities: tuple[float, ...] = ()
    """Of each reply; empty where nothing scores them."""

    @property
    def rate(self) -> float:
        """The teacher's share of the tokens."""
        return self.teacher_tokens / self.tokens

    def then(self, more: "MeasuredReplies") -> "MeasuredReplies":
        """With the replies to the next prompts."""
        return MeasuredReplies(
            self.replies + more.replies,
            self.tokens + more.tokens,
            self.teacher_tokens + more.teacher_tokens,
            self.qualities + more.qualities,
        )


NOTHING = MeasuredReplies()
Kept = dict[tuple[float, float], MeasuredReplies]
"""By budget and price."""


class Pass(NamedTuple):
    """All prompts at one budget and price."""

    share: float
    """Of the scores that are above the price."""
    price: float
    rate: float
    """Realised."""


@dataclass
class Search:
    """For the price of one budget."""

    budget: float
    share: float
    """Of the positions that ask at the next price."""
    passes: list[Pass] = field(default_factory=list)

    @property
    def is_settled(self) -> bool:
        """Whether nothing more is to be tried."""
        return len(self.passes) >= PASSES or any(map(self._is_near, self.passes))

    @property
    def best(self) -> Pass:
        """The nearest."""
        return min(self.passes, key=lambda tried: abs(tried.rate - self.budget))

    def saw(self, tried: Pass) -> None:
        """Take in what a pass realised, and choose the next share."""
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
    """Of one router."""

    gateway: RunningGateway
    sources: Sequence[Source]
    """Of the validation examples."""
    budgets: Sequence[float]
    """Fractions, increasing."""
    ask_tokens: int
    scores: Tensor
    """(N,) of the gate."""
    put: Callable[[Found], None]
    """Hands the router over with these prices."""
    file: Path
    """Of the replies so far: a stopped run goes on after the last ones."""
    qualities: Qualities | None = None
    """Scores replies; None: prices are chosen by the rate alone."""

    def found(self) -> Found:
        """The gateway serves with the prices.

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
        """The prices that spend the budgets."""
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
        """For each budget its own price, or a higher one that is clearly better."""
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
        """Mean of all prompts; -inf where this was not tried."""
        measured = kept.get((budget, price))
        return -math.inf if measured is None else fmean(measured.qualities)

    def _gap(self, kept: Kept) -> float:
        """Between student and teacher alone, by their mean qualities; 1 if there is none."""
        alone = (0.0, 0.0)
        teacher = (1.0, 0.0)
        self._ask([alone, teacher], kept, "router: both models alone")
        gap = fmean(kept[teacher].qualities) - fmean(kept[alone].qualities)
        return gap if gap > 0 else 1.0

    def _measure(self, budgets: Sequence[float], prices: dict[float, float], kept: Kept, name: str) -> None:
        """All prompts at these of the budgets, as far as it is not kept."""
        points = [(budget, prices[budget]) for budget in budgets]
        if all(self._is_whole(kept, point) for point in points):
            return
        put = list(prices.items())
        self.put(Found(put, put))
        self._ask(points, kept, name)

    def _is_whole(self, kept: Kept, point: tuple[float, float]) -> bool:
        return kept.get(point, NOTHING).replies == len(self.sources)

    def _ask(self, points: Sequence[tuple[float, float]], kept: Kept, name: str) -> None:
        """The prompts that are missing at these budgets, at the prices that the gateway has."""
        parts = []
        for first in range(0, len(self.sources), TOGETHER):
            parts += [(first, point) for point in points if kept.get(point, NOTHING).replies <= first]
        if not parts:
            return
        for first, point in track(parts, name, console=console):
            kept[point] = kept.get(point, NOTHING).then(self._answered(first, point[0]))
            self._keep(kept)

    def _prices(self, searches: Sequence[Search]) -> dict[float, float]:
        """By budget: what was found, else what is tried next; none is above that of a smaller budget."""
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
        """The prompts from the first on, at the price that the gateway has."""
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
        """Whole or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.file.with_suffix(".tmp")
        rows = []
        for (budget, price), measured in kept.items():
            rows.append({"budget": budget, "price": price, "measured": measured})
        scratch.write_text(json.dumps(rows))
        os.replace(scratch, self.file)


def passes_of(budgets: int) -> int:
    """Most passes over all prompts for this many budgets: also those of student and teacher alone."""
    return budgets * (PASSES + HIGHER) + 2


def _tensor(qualities: Sequence[float]) -> Tensor:
    return torch.tensor(qualities, dtype=torch.float64)
