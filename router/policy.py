"""Turns the state of a budget into the terms on which the student may ask."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from router.adaptive import AdaptiveCalibration
from router.budget import Bucket, Budget

REFILL_TOKENS = 10
"""If a bucket needs more tokens than this to gain a call, the price rises less: it is for a whole segment."""


class LeastPrice(NamedTuple):
    """A lower bound of one teacher's price."""

    teacher: str
    price: float


@dataclass(frozen=True)
class Terms:
    """Terms of one student segment: ask if score > price, but not in its first ``not_before`` tokens.

    From ``spare_from`` tokens on the price is ``spare_price``, if there is one.
    """

    price: float
    not_before: int = 0
    spare_price: float | None = None
    spare_from: int = 0
    dearer: tuple[float, ...] = ()
    """Prices of all teachers but the cheapest, above ``price`` and not decreasing. A score above the first
    of them is worth the second cheapest teacher, and so on.
    """
    least: tuple[LeastPrice, ...] = ()
    """Lower bounds of the teachers' prices, for a gate with an output for each, in the order of the outputs.
    ``price`` is the common price then. A teacher that may not be asked has inf.
    """

    @property
    def never(self) -> bool:
        """True when the student never asks."""
        return self.price == math.inf

    @property
    def always(self) -> bool:
        """True when the teacher writes at once, whatever the student's scores."""
        return self.price == -math.inf and self.not_before == 0


NEVER = Terms(price=math.inf)


class Prices(Protocol):
    """Maps a teacher rate to the price that realises it: measured once, or learned while serving."""

    @property
    def points(self) -> Sequence[tuple[float, float]]:
        """(rate, price), rate increasing in (0, 1), price not increasing."""

    def price(self, rate: float) -> float:
        """Price for a teacher rate; never (inf) at 0, always (-inf) at 1."""


@dataclass(frozen=True)
class Calibration:
    """Price at which a gate realises a teacher rate, measured in the closed loop on validation data.

    points: (rate, price), rate increasing in (0, 1), price not increasing.
    """

    points: Sequence[tuple[float, float]]

    def __post_init__(self) -> None:
        rates = [rate for rate, _ in self.points]
        prices = [price for _, price in self.points]
        if not rates or rates != sorted(set(rates)) or not 0 < rates[0] <= rates[-1] < 1:
            raise ValueError(f"calibration rates must increase within (0, 1), got {rates}")
        if prices != sorted(prices, reverse=True) or not all(map(math.isfinite, prices)):
            raise ValueError(f"calibration prices must be finite and not increase, got {prices}")

    @classmethod
    def of_random_gate(cls, ask_tokens: int) -> "Calibration":
        """The calibration of the random gate, which needs no measurement.

        Asking at a share p of the positions gives the rate r = p K / (p K + 1 - p) for calls of K
        tokens, and the random gate asks with probability 1 - price.
        """
        points = []
        for step in range(1, 100):
            rate = step / 100
            points.append((rate, 1 - rate / (ask_tokens * (1 - rate) + rate)))
        return cls(tuple(points))

    def price(self, rate: float) -> float:
        """Price for a teacher rate; linear between points; never (inf) at 0, always (-inf) at 1."""
        if rate <= 0:
            return math.inf
        if rate >= 1:
            return -math.inf
        rates = [measured for measured, _ in self.points]
        right = bisect_left(rates, rate)
        if right == 0:
            return self.points[0][1]
        if right == len(rates):
            return self.points[-1][1]
        low_rate, low_price = self.points[right - 1]
        high_rate, high_price = self.points[right]
        return low_price + (high_price - low_price) * (rate - low_rate) / (high_rate - low_rate)


@dataclass(frozen=True)
class GateOutput:
    """One teacher's output, of a gate that has an output for each of several teachers."""

    teacher: str
    cost: float
    """Cost of its token: its price is the common price times this. Below 0, costs do not count."""
    alone: Prices | None = None
    """Prices if this is the only teacher that is asked; None: not measured."""

    def price(self, rate: float, common: Prices) -> float:
        """The price at which this teacher alone realises no more than a rate."""
        if self.alone is not None:
            return self.alone.price(rate)
        price = common.price(rate)
        return price * self.cost if price > 0 else price

    def common(self, price: float) -> float:
        """The common price at which this teacher has a given price."""
        return price / self.cost if price > 0 else price


@dataclass(frozen=True)
class Policy:
    """Prices the next student segment of a request.

    A fraction is a rate already. A bucket with less than a call in it makes the price higher. So the next
    call goes where it is worth most, not to the first place after the last one. Tokens, calls and money are
    spent by plan: what is left of them, divided by what is still to be written. So an eager start does not
    spend the whole budget.

    A fraction is a bound that is not used up if more teacher tokens would not help. With ``spare`` it is a
    rate to hit. While a call fits into the fraction itself, its price is the spare one. The span on top is
    kept for positions that are worth the other price.
    """

    calibration: Prices
    expected_tokens: float
    """Mean completion length on validation data, in tokens."""
    spare: Calibration | None = None
    """Spare price of each fraction; None: a fraction is only a bound."""
    outputs: tuple[GateOutput, ...] = ()
    """Outputs of a gate that has one for each of several teachers; else empty."""

    def terms(
        self,
        bucket: Bucket,
        completion_tokens: int,
        max_tokens: int,
        *,
        ceiling: float = 1.0,
        pause: int = 0,
        reads: int = 0,
        caps: Sequence[float] = (1.0,),
        names: Sequence[str] = (),
    ) -> Terms:
        """Terms for a request that has written ``completion_tokens`` of at most ``max_tokens``.

        Args:
            bucket: bucket of the request.
            completion_tokens: number of tokens so far.
            max_tokens: largest length of the completion.
            ceiling: the rate that shared limits leave to aim at.
            pause: number of tokens during which the student may not ask.
            reads: tokens that a call would now read.
            caps: the highest rate of each teacher, from the cheapest to the dearest.
            names: names of these teachers, for a gate with an output for each.
        """
        earliest = bucket.earliest(reads)
        if earliest is None or earliest >= max_tokens:
            return NEVER
        ceiling = min(ceiling, sum(caps))
        planned = self._planned(bucket, completion_tokens, max_tokens, reads)
        rate = min(ceiling, self._fraction(bucket, completion_tokens), planned)
        terms = Terms(self.calibration.price(rate), max(0, earliest - completion_tokens, pause))
        if self.outputs:
            terms = self._by_outputs(terms, rate, dict(zip(names, caps, strict=False)))
        elif len(caps) > 1:
            terms = replace(terms, dearer=self._dearer(terms.price, rate, caps))
        spare_from = bucket.spare_from()
        if self.spare is None or spare_from is None:
            return terms
        fraction = 1.0 if bucket.budget.fraction is None else bucket.budget.fraction
        rate = min(ceiling, fraction, planned)
        return replace(
            terms,
            spare_price=min(terms.price, self.spare.price(rate)),
            spare_from=max(terms.not_before, spare_from - completion_tokens),
        )

    def rate(self, bucket: Bucket, completion_tokens: int, max_tokens: int, reads: int = 0) -> float:
        """The rate at which a bucket is spent by plan; arguments as in `terms`."""
        planned = self._planned(bucket, completion_tokens, max_tokens, reads)
        return min(1.0, self._fraction(bucket, completion_tokens), planned)

    def _dearer(self, price: float, rate: float, caps: Sequence[float]) -> tuple[float, ...]:
        """The prices of all teachers but the cheapest.

        Each of n teachers gets a share of rate / n, or its cap if that is less. The dearest one gets the
        highest scores, and the next one the scores below them. If a teacher's price is not above the first
        one, the scores cannot tell, and that teacher is not asked by its score. A price that is the same for
        several rates realises the lowest of them.
        """
        rate = min([rate, *(measured for measured, at in self.calibration.points if at <= price)])
        prices: list[float] = []
        share = 0.0
        above = math.inf
        for place, cap in enumerate(reversed(caps[1:]), start=1):
            share = min(share + cap, rate * place / len(caps))
            own = self.calibration.price(share)
            above = min(above, own) if own > price else above
            prices.append(above)
        return tuple(reversed(prices))

    def _by_outputs(self, terms: Terms, rate: float, caps: Mapping[str, float]) -> Terms:
        """Terms in which each teacher's price is the common price times its cost.

        A teacher with a cap has at least the price of its cap. A teacher that is alone has the price that was
        measured for it alone.
        """
        there = [output for output in self.outputs if output.teacher in caps]
        if not there:  # only tools, for example
            return terms
        least = []
        for output in self.outputs:
            cap = caps.get(output.teacher, 0.0)
            price = -math.inf if cap >= rate else output.price(cap, self.calibration)
            least.append(LeastPrice(output.teacher, price))
        if len(there) == 1:
            (only,) = there
            terms = replace(terms, price=only.common(only.price(rate, self.calibration)))
        return replace(terms, least=tuple(least))

    def observe(
        self, bucket: Bucket, teacher_tokens: int, completion_tokens: int, *, ceiling: float, running: int
    ) -> None:
        """Report the realised rate of a stretch of a completion to a calibration that learns.

        Only a plain fraction teaches: other budgets, and shared limits below it, aim at other rates. With an
        output for each teacher, the common price of all of them is learned.

        Args:
            bucket: bucket of the request.
            teacher_tokens: tokens of the stretch that the teacher wrote.
            completion_tokens: all tokens of the stretch.
            ceiling: the rate that shared limits leave to aim at.
            running: requests that are being written at this moment.
        """
        budget = bucket.budget
        others = (budget.tokens, budget.calls, budget.cost)
        if budget.fraction is None or any(part is not None for part in others):
            return
        if isinstance(budget, Budget) and (budget.owns or (self.outputs and budget.teachers is not None)):
            return
        if ceiling >= budget.fraction and isinstance(self.calibration, AdaptiveCalibration):
            self.calibration.observe(budget.fraction, teacher_tokens, completion_tokens, running=running)

    def _planned(self, bucket: Bucket, completion_tokens: int, max_tokens: int, reads: int) -> float:
        """Rate at which the tokens, calls and money left last to the end; inf without such a budget."""
        expected = min(self.expected_tokens, max_tokens)
        to_write = max(expected - completion_tokens, bucket.ask_tokens)
        rates = [math.inf]
        if bucket.tokens_left is not None:
            rates.append(bucket.tokens_left / to_write)
        if bucket.calls_left is not None:
            rates.append(bucket.calls_left * bucket.ask_tokens / to_write)
        affordable = bucket.affordable(reads, math.ceil(to_write))
        if affordable is not None:
            rates.append(affordable / to_write)
        return min(rates)

    def _fraction(self, bucket: Bucket, completion_tokens: int) -> float:
        """The rate of the budget's fraction: f exp(-a (1 - calls in the bucket)) below one call.

        The form and a = min(1, REFILL_TOKENS * f / ask_tokens) are from trial: see docs/budgets.md.
        """
        fraction = bucket.budget.fraction
        if fraction is None or fraction == 1.0:
            return 1.0
        lacking = max(0.0, 1 - bucket.credit(completion_tokens) / bucket.ask_tokens)
        return fraction * math.exp(-min(1.0, REFILL_TOKENS * fraction / bucket.ask_tokens) * lacking)
