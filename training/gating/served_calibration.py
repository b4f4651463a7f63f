"""The prices of the budgets, found with a running gateway: what a price realises on validation prompts.

A price is first a quantile of the gate's scores: at the share of positions that a budget needs. The router
goes to the gateway with these prices, and the gateway answers the prompts under each budget's bucket. Where
another rate comes out, the share is corrected, and the router goes there again.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from measuring.chats import Source
from training.gating.duals import asking_share
from training.loop.progress import console
from training.running_gateway import RunningGateway

PASSES = 5
"""Most passes over the prompts for each budget."""
NEAR = 0.1
"""Share of a budget by which the realised rate may miss it, within `LEAST` and `MOST`."""
LEAST = 0.003
MOST = 0.01
STEP = 4.0
"""A share is multiplied or divided by no more than this."""

Points = list[tuple[float, float]]
"""(fraction, price)."""
Rates = dict[tuple[float, float], float]
"""What was realised, by budget and price."""


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
    put: Callable[[Points], None]
    """Hands the router over with these prices."""
    file: Path
    """Of the passes so far: a stopped run goes on after the last one."""

    def found(self) -> Points:
        """(budget, price), prices not rising; the gateway serves with them.

        Raises:
            GatewayError: the gateway cannot be used.
        """
        searches = []
        for budget in self.budgets:
            searches.append(Search(budget, asking_share(budget, self.ask_tokens)))
        kept = self._kept()
        for number in range(1, PASSES + 1):
            prices = self._prices(searches)
            waiting = [search for search in searches if not search.is_settled]
            if not waiting:
                break
            if any((search.budget, prices[search.budget]) not in kept for search in waiting):
                self.put(list(prices.items()))
            for search in track(waiting, f"router: prices, pass {number}", console=console):
                price = prices[search.budget]
                asked = (search.budget, price)
                if asked not in kept:
                    kept[asked] = self._measured(search.budget, price)
                    self._keep(kept)
                search.saw(Pass(self._share_above(price), price, kept[asked]))
        found = self._prices(searches)
        self.put(list(found.items()))
        for search in searches:
            console.print(
                f"router: budget {search.budget:g} has price {found[search.budget]:.4g}, "
                f"rate {search.best.rate:.3f}"
            )
        return list(found.items())

    def _prices(self, searches: Sequence[Search]) -> dict[float, float]:
        """By budget: what was found, else what is tried next; none is above that of a smaller budget."""
        prices = []
        for search in searches:
            prices.append(search.best.price if search.is_settled else self._price_at(search.share))
        return dict(zip(self.budgets, accumulate(prices, min), strict=True))

    def _price_at(self, share: float) -> float:
        return torch.quantile(self.scores.double(), 1 - share).item()

    def _share_above(self, price: float) -> float:
        return (self.scores.double() > price).double().mean().item()

    def _measured(self, budget: float, price: float) -> float:
        """The rate of all prompts."""
        replies = self.gateway.replies(self.sources, budget)
        teacher_tokens = sum(reply.teacher_tokens for reply in replies)
        return teacher_tokens / sum(len(reply.token_ids) for reply in replies)

    def _kept(self) -> Rates:
        if not self.file.exists():
            return {}
        return {(budget, price): rate for budget, price, rate in json.loads(self.file.read_text())}

    def _keep(self, rates: Rates) -> None:
        """Whole or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.file.with_suffix(".tmp")
        scratch.write_text(json.dumps([[*asked, rate] for asked, rate in rates.items()]))
        os.replace(scratch, self.file)
