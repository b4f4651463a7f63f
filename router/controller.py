"""Converts a shared budget to a rate that each request may aim at.

The ledger makes a limit hold. With a ledger alone, requests are served first come, first served, and the
tokens run out when they are worth most. The controller moves one rate for all requests, and so one price,
until the limit is just met. Every request then asks for the spans that are worth this price.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from router.ledger import AnyLimit, FractionOfTraffic, Scope, Status
from router.ledger.base import SUB_WINDOWS
from router.policy import Prices

GAIN = 100.0
"""An error of one hundredth of a window's allowance moves the rate by a factor e."""
LAG_SECONDS = 2.0
"""Shortest time in which the rate follows: a new price reaches a request with its next segment."""
STEP = 0.05
"""Largest step of the rate's logarithm by one span, so a small budget moves slowly."""
JUMP = 0.5
"""Largest step of the rate's logarithm by one update: updates may be rare for a short window."""
AIM = 0.98
"""Share of a limit to aim at. With 1 the ledger would refuse now and then."""
EVENLY = AIM * SUB_WINDOWS / (SUB_WINDOWS + 1)
"""`AIM` for tokens per window: the ledger's window is up to a sub-window longer than the limit's."""
FORGETTING = 0.99
"""Share of their weight that older spans keep, with each new span, in the cost of a teacher token."""
LEARNING = 0.05
"""Share of a window after which the traffic so far is taken as typical."""


class LedgerTotals(NamedTuple):
    """Totals that a ledger has counted under one limit up to some time."""

    seconds: float
    """Time of the totals, on a steady clock."""
    spent: int
    """Teacher tokens, or nanos under a limit in money."""
    completion: int
    """Completion tokens of both models."""


class RateRange(NamedTuple):
    """The rates that a calibration covers."""

    lowest: float
    highest: float


@dataclass
class RateController:
    """The rate to aim at under one limit, by dual ascent on what was spent.

        rate = target * exp(u),    du = GAIN * (allowed - spent) / allowed in a window

    The price is the limit's dual variable; its step is proportional to the limit's violation (adaptive
    pacing: Balseiro and Gur, Management Science 2019). Two things are changed here. The step is taken in the
    logarithm of the rate, and `Prices` turns the rate into a price. So the controller knows neither the
    gate's units nor the amount of traffic. And u stops at the ends of the calibrated range, so it does not
    wind up while the limit does not bind.

    The target of a fraction is that fraction times `AIM`. For tokens or money per window, it is the rate that
    spends them on as much traffic as the last window brought, however unevenly. Before a window has passed,
    the traffic of a whole window is extrapolated.
    """

    limit: AnyLimit
    lowest: float
    """Lowest rate of the calibrated range."""
    highest: float
    """Highest rate of the calibrated range."""
    span_tokens: int
    token_cost: float = 1.0
    """Amount of the limit that a teacher token takes: 1, or its cost in nanos if the limit is in money."""
    u: float = 0.0
    """Logarithm of rate / target."""
    target: float = 1.0
    """Rate that meets the limit if every request realises it."""
    last: LedgerTotals | None = None
    """Totals at the last update."""
    first: LedgerTotals | None = None
    """Totals at the first update."""

    def __post_init__(self) -> None:
        if isinstance(self.limit, FractionOfTraffic) and self.limit.fraction < 1.0:
            self.target = AIM * self.limit.fraction

    @property
    def rate(self) -> float:
        """The rate to aim at: 1 if the limit cannot bind, 0 if it allows nothing."""
        if not 0.0 < self.target < 1.0:
            return min(self.target, 1.0)
        return min(max(self.target * math.exp(self.u), self.lowest), self.highest)

    def update(self, now: float, status: Status) -> None:
        """Learn what was spent up to ``now`` (seconds of a steady clock). Frequent calls are better."""
        totals = LedgerTotals(now, status.total_spent, status.total_completion)
        first = self.first
        last = self.last
        self.last = totals
        if first is None or last is None or totals.completion < last.completion:  # counts may be lost
            self.first = totals
            return
        in_window = status.in_window
        if not isinstance(self.limit, FractionOfTraffic) and in_window:
            affordable = EVENLY * self.limit.size / self.token_cost
            self.target = affordable / self._traffic(first, totals, in_window)
        if in_window <= 0 or not 0 < self.target < 1:
            return
        allowed = self.target * (totals.completion - last.completion)
        spent = (totals.spent - last.spent) / self.token_cost
        allowed_in_window = self.target * in_window
        step_gain = STEP * allowed_in_window / self.span_tokens
        gain = min(GAIN, self.limit.window_seconds / LAG_SECONDS, step_gain)
        self.u += min(max(gain * (allowed - spent) / allowed_in_window, -JUMP), JUMP)
        self.u = min(max(self.u, math.log(self.lowest / self.target)), math.log(self.highest / self.target))

    def _traffic(self, first: LedgerTotals, totals: LedgerTotals, in_window: int) -> float:
        """Completion tokens that a window will bring."""
        window = self.limit.window_seconds
        age = max(totals.seconds - first.seconds, LEARNING * window)
        if age >= window:
            return in_window
        return max(in_window, (totals.completion - first.completion) * window / age)


@dataclass
class PriceController:
    """The controllers of all limits, and the resulting price."""

    calibration: Prices
    span_tokens: int
    controllers: dict[str, RateController] = field(default_factory=dict)
    """Controller of each limit, by scope id."""
    _cost: float = 0.0
    _cost_tokens: float = 0.0

    @property
    def _range(self) -> RateRange:
        points = self.calibration.points
        return RateRange(points[0][0], points[-1][0])

    def calibrate(self, calibration: Prices, span_tokens: int) -> None:
        """Switch to another router's calibration. The limits' learned rates stay, within its range."""
        self.calibration = calibration
        self.span_tokens = span_tokens
        for controller in self.controllers.values():
            controller.lowest = self._range.lowest
            controller.highest = self._range.highest
            controller.span_tokens = span_tokens

    def update(self, now: float, statuses: Iterable[Status]) -> None:
        """Learn the scopes' states. Every gateway learns from the same ledger, so all aim alike."""
        for status in statuses:
            if status.scope.limit.in_money and self.token_cost is None:
                continue  # the rate that it allows is not known yet
            controller = self.controllers.get(status.scope.id)
            if controller is None or controller.limit != status.scope.limit:
                controller = RateController(
                    status.scope.limit, self._range.lowest, self._range.highest, self.span_tokens
                )
                self.controllers[status.scope.id] = controller
            if status.scope.limit.in_money and self.token_cost is not None:
                controller.token_cost = self.token_cost
            controller.update(now, status)

    @property
    def token_cost(self) -> float | None:
        """Recent cost of a teacher token in nanos, with what was read for it; None if unknown."""
        return self._cost / self._cost_tokens if self._cost_tokens and self._cost else None

    def learn_cost(self, nanos: int, tokens: int) -> None:
        """Learn from a span of ``tokens`` tokens that has cost ``nanos``."""
        self._cost = FORGETTING * self._cost + nanos
        self._cost_tokens = FORGETTING * self._cost_tokens + tokens

    def rate(self, scopes: Iterable[Scope], weight: float = 1.0) -> float:
        """The rate that a request under these limits may aim at; its own budget may allow less.

        ``weight`` is the tenant's priority: under a global limit its rate is the common one times this.
        """
        rates = [1.0]
        for scope in scopes:
            if controller := self.controllers.get(scope.id):
                rates.append(controller.rate * (weight if scope.kind == "global" else 1.0))
        return min(rates)

    def price(self, scopes: Iterable[Scope], weight: float = 1.0) -> float:
        """What a teacher token costs under these limits, in the gate's units; -inf if none binds."""
        return self.calibration.price(self.rate(scopes, weight))
