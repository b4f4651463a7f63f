"""Synthetic traffic in which some requests need the teacher more than others, and which shifts.

At every position a span of the teacher has a worth: little and often nothing in an easy request, much in a
hard one. The gate sees that worth through noise. Requests come and go. In one step of the simulation, each
request gets one token.
"""

import asyncio
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from router.budget import Bucket, Budget
from router.controller import PriceController
from router.ledger import FractionOfTraffic, Lease, MemoryLedger, Scope, TokensPerWindow
from router.policy import Calibration, Policy

SPAN = 4
STEP_SECONDS = 0.05
MEAN_LENGTH = 80
NOISE = 0.3
SHIFTS = (0.5, 0.1, 0.9, 0.3, 0.7, 0.05)
"""Share of hard requests in each part of the traffic, in order."""


@dataclass
class Request:
    """A completion being written."""

    hard: bool
    length: int
    bucket: Bucket
    written: int = 0
    pause: int = 0
    """Number of tokens until the request may ask again."""
    price: float = math.inf
    """Price of the segment. It stays until the request asks, as the gate gets one price per segment."""


@dataclass
class Traffic:
    """Synthetic traffic. The same seed brings the same requests, whatever is decided about them."""

    seed: int
    steps: int
    streams: int
    shifts: Sequence[float] = SHIFTS

    def requests(self) -> Iterator[tuple[int, bool, int]]:
        """(step of arrival, whether it is hard, length in tokens) of each request."""
        rng = random.Random(self.seed)
        arrivals = self.streams / MEAN_LENGTH
        for step in range(self.steps):
            hard = self.shifts[step * len(self.shifts) // self.steps]
            while rng.random() < arrivals / (1 + arrivals):
                yield step, rng.random() < hard, max(8, round(rng.expovariate(1 / MEAN_LENGTH)))


def worth(rng: random.Random, hard: bool) -> float:
    """Worth of a teacher token at a position, for example in nats of regret."""
    return rng.expovariate(1.0) * (1.0 if hard else 0.25)


def score(rng: random.Random, value: float) -> float:
    """The gate's score for a worth."""
    return value * math.exp(rng.gauss(0.0, NOISE))


def calibrate(seed: int = 0, positions: int = 20_000, hard: float = 0.5, ask: int = SPAN) -> Calibration:
    """Prices by rate for traffic with a share ``hard``: asking at a share p gives p K / (p K + 1 - p)."""
    rng = random.Random(seed)
    scores = sorted((score(rng, worth(rng, rng.random() < hard)) for _ in range(positions)), reverse=True)
    points = []
    for percent in (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90):
        rate = percent / 100
        share = rate / (ask * (1 - rate) + rate)
        points.append((rate, scores[int(share * positions)]))
    return Calibration(tuple(points))


@dataclass
class Outcome:
    """The result of a simulation under one budget."""

    student: int = 0
    teacher: int = 0
    value: float = 0.0
    refused: int = 0
    worst_excess: float = -math.inf
    """Largest excess over the hard bound at a reservation; never above 0."""
    rates: list[float] = field(default_factory=list)
    """Realised rates over the ledger's window, after the first window."""

    @property
    def rate(self) -> float:
        return self.teacher / (self.teacher + self.student)


Price = Callable[[Request, PriceController, Sequence[Scope]], float]
"""The price of a request's next token."""


def first_come(request: Request, controller: PriceController, scopes: Sequence[Scope]) -> float:
    """Every request spends its own budget by itself, first come, first served."""
    return controller.calibration.price(request.bucket.budget.fraction)


def fixed_price(rate: float) -> Price:
    """A policy with the calibrated price of the budget, which is never corrected."""

    def price(request: Request, controller: PriceController, scopes: Sequence[Scope]) -> float:
        return controller.calibration.price(rate)

    return price


def fixed_schedule(rate: float) -> Price:
    """A policy with the same share for every request: a span every N tokens."""

    def price(request: Request, controller: PriceController, scopes: Sequence[Scope]) -> float:
        due = request.bucket.spent + SPAN / 2 <= rate * (request.written + SPAN / 2)
        return -math.inf if due else math.inf

    return price


def controlled(request: Request, controller: PriceController, scopes: Sequence[Scope]) -> float:
    """The policy of this project: a price by the controller."""
    policy = Policy(controller.calibration, MEAN_LENGTH)
    terms = policy.terms(request.bucket, request.written, request.length, ceiling=controller.rate(scopes))
    return terms.price


async def simulate(
    traffic: Traffic,
    limit: FractionOfTraffic | TokensPerWindow,
    price: Price,
    calibration: Calibration,
    own: float = 0.5,
    ask: int = SPAN,
) -> Outcome:
    """Run the traffic through a real ledger and controller; every request has a budget of ``own``.

    A span is asked for ``ask`` tokens at a time.
    """
    now = 0.0
    ledger = MemoryLedger(clock=lambda: now)
    scope = Scope("global", "", limit)
    scopes = [scope]
    controller = PriceController(calibration, SPAN)
    rng = random.Random(traffic.seed + 1)
    outcome, active = Outcome(), []
    coming = traffic.requests()
    following = next(coming, None)
    controller.update(now, await ledger.status(scopes))
    for step in range(traffic.steps):
        now = step * STEP_SECONDS
        while following and following[0] <= step:
            _, hard, length = following
            active.append(Request(hard, length, Bucket(Budget(fraction=own), SPAN, ask)))
            following = next(coming, None)
        student = 0
        for request in active:
            value = worth(rng, request.hard)
            seen = score(rng, value)
            if request.price == math.inf:
                request.price = price(request, controller, scopes)
            if request.pause:
                request.pause -= 1
            elif seen > request.price and (
                grant := request.bucket.reserve(request.written, request.length - request.written)
            ):
                request.price = math.inf
                lease = await ledger.reserve(scopes, grant.tokens, at_least=1)
                if isinstance(lease, Lease):
                    request.bucket.settle(grant, lease.tokens)
                    if isinstance(limit, FractionOfTraffic):
                        outcome.worst_excess = max(outcome.worst_excess, await excess(ledger, scope))
                    await ledger.settle(lease, lease.tokens)
                    outcome.teacher += lease.tokens
                    outcome.value += value * lease.tokens
                    request.written += lease.tokens
                    continue
                request.bucket.settle(grant, 0)
                outcome.refused += 1
                request.pause = SPAN
            request.written += 1
            student += 1
        await ledger.record(scopes, student)
        outcome.student += student
        active = [request for request in active if request.written < request.length]
        if step % 10 == 0:
            (status,) = await ledger.status(scopes)
            controller.update(now, [status])
            if now > limit.window_seconds:
                outcome.rates.append(status.rate)
    return outcome


async def excess(ledger: MemoryLedger, scope: Scope) -> float:
    """Tokens above the bound if all reserved tokens were written; negative if there is room."""
    (status,) = await ledger.status([scope])
    held, limit = status.spent + status.reserved, scope.limit
    return held - limit.fraction * (status.student_tokens + held) - limit.slack_tokens


def hindsight(traffic: Traffic, rate: float) -> float:
    """The value with one price for all requests, chosen in hindsight: no policy does better with this gate.

    At every position of the same requests, a span is taken if its score is among the best. Positions inside a
    span are skipped, as in the simulation.
    """
    low, high = 0.0, 20.0
    value = 0.0
    for _ in range(20):
        price = (low + high) / 2
        rng = random.Random(traffic.seed + 1)
        teacher = student = 0
        value = 0.0
        for _, hard, length in traffic.requests():
            written = 0
            while written < length:
                here = worth(rng, hard)
                if score(rng, here) > price:
                    tokens = min(SPAN, length - written)
                    teacher, value, written = teacher + tokens, value + here * tokens, written + tokens
                else:
                    student, written = student + 1, written + 1
        low, high = (low, price) if teacher / (teacher + student) < rate else (price, high)
    return value


def run(*arguments: object, **options: object) -> Outcome:
    return asyncio.run(simulate(*arguments, **options))
