"""Budgets of teacher tokens, and the token bucket that enforces one request's budget."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from router.money import Money, TokenPrices, picos

# Slack for comparing a sum of binary fractions with an integer count of tokens.
EPSILON = 1e-9

LONGEST = 10**12
"""More tokens than any completion has. Up to this length, products with tiny fractions are exact enough."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


def _whole(value: Any) -> Any:
    """Turn 3.0 into 3: in JSON they are the same number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_whole)]


TeacherName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
PARTS = ("fraction", "tokens", "calls", "cost")


class Bounds(BaseModel):
    """A bound on the use of one teacher, or of all teachers together. Every part that is set holds.

    - fraction: teacher tokens / completion tokens, in [0, 1]; exceeded by at most one span.
    - tokens: teacher tokens, never exceeded.
    - calls: teacher calls, never exceeded.
    - cost: money for the tokens that the teacher reads and writes, by the gateway's prices; never exceeded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    fraction: Fraction | None = None
    tokens: Count | None = None
    calls: Count | None = None
    cost: Money | None = None

    @model_validator(mode="before")
    @classmethod
    def _number_is_fraction(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"fraction": value}
        return value

    @model_validator(mode="after")
    def _bounds_something(self) -> Self:
        if not self._is_bound:
            raise ValueError("set at least one of fraction, tokens, calls, cost")
        return self

    @property
    def _is_bound(self) -> bool:
        return any(getattr(self, part) is not None for part in PARTS)

    @property
    def is_zero(self) -> bool:
        """True when not a single teacher token may be spent."""
        return 0 in (self.fraction, self.tokens, self.calls, self.cost)

    def parts(self) -> dict[str, float]:
        """The parts that are set, by name."""
        return {part: getattr(self, part) for part in PARTS if getattr(self, part) is not None}

    def exceeded_by(self, wanted: "Bounds") -> list[str]:
        """For each part of ``wanted`` that is more than this bound allows, the problem in words."""
        most = self.parts()
        return [
            f"{part} {asked:g} is more than this key's maximum of {most[part]:g}"
            for part, asked in wanted.parts().items()
            if asked > most.get(part, asked)
        ]


def _by_name(value: Any) -> Any:
    """Turn a list of names into an object in which no teacher has a budget of its own."""
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        return value
    if len(set(value)) < len(value):
        raise ValueError("the list has a name twice")
    return dict.fromkeys(value)


class Budget(Bounds):
    """The tokens, calls and money of its teachers that one request may use."""

    teachers: (
        Annotated[dict[TeacherName, Bounds | None], BeforeValidator(_by_name), Field(min_length=1)] | None
    ) = None
    """Teachers that may be asked, each with a smaller bound of its own if it has one; None: all teachers."""

    @property
    def _is_bound(self) -> bool:
        return super()._is_bound or (self.teachers is not None and None not in self.teachers.values())

    @property
    def is_zero(self) -> bool:
        """True when not a single teacher token may be spent."""
        if super().is_zero:
            return True
        return self.teachers is not None and all(own and own.is_zero for own in self.teachers.values())

    @property
    def owns(self) -> list[Bounds]:
        """The bounds that single teachers have of their own."""
        return [own for own in (self.teachers or {}).values() if own is not None]

    @property
    def in_money(self) -> bool:
        """Whether the budget, or a single teacher's own bound, has a cost."""
        return any(part.cost is not None for part in (self, *self.owns))

    def own(self, teacher: str) -> Bounds | None:
        """The bound that one teacher has of its own; None if it has none."""
        return None if self.teachers is None else self.teachers.get(teacher)

    def exceeded_by(self, wanted: Bounds) -> list[str]:
        """See `Bounds.exceeded_by`; also checks the teachers of ``wanted`` and their own bounds."""
        exceeded = super().exceeded_by(wanted)
        if not isinstance(wanted, Budget):
            return exceeded
        for name, asked in (wanted.teachers or {}).items():
            own = self.own(name)
            if self.teachers is not None and name not in self.teachers:
                exceeded.append(f"the teacher {name} is not for this key")
            elif own is not None and asked is not None:
                exceeded += [f"{name}: {problem}" for problem in own.exceeded_by(asked)]
        return exceeded

    def within(self, maximum: "Budget") -> "Budget":
        """The smaller of this budget and the maximum, part by part."""
        parts: dict[str, Any] = _least(self, maximum)
        if self.teachers is None or maximum.teachers is None:
            both = self.teachers or maximum.teachers
        else:
            names = [name for name in self.teachers if name in maximum.teachers]
            if not names:
                return Budget(tokens=0)
            both = {name: _less(self.teachers[name], maximum.teachers[name]) for name in names}
        return Budget(**parts, teachers=both)

    def unknown(self, known: Collection[str]) -> str | None:
        """The first teacher of this budget that is not ``known``; None if all are."""
        return next((name for name in self.teachers or () if name not in known), None)


def _least(one: Bounds, other: Bounds) -> dict[str, float]:
    parts = other.parts()
    for part, value in one.parts().items():
        parts[part] = min(value, parts.get(part, value))
    return parts


def _less(one: Bounds | None, other: Bounds | None) -> Bounds | None:
    if one is None or other is None:
        return one or other
    return Bounds.model_validate(_least(one, other))


@dataclass
class Grant:
    """Teacher tokens reserved for one span; to be settled exactly once (settling again is a no-op)."""

    tokens: int
    cost: int | None = None
    """Picos reserved for reading and writing; None if the budget has no cost."""
    planned: int = 0
    """Picos that the call would cost at most by the bucket's own prices."""
    settled: bool = False


class Bucket:
    """One request's budget and its spending so far.

    Reserve before a span, settle after it. The hard bound, at every moment of the completion:

        teacher_tokens <= fraction * completion_tokens + span_tokens

    The student asks for ``ask_tokens`` at a time, and asks again after them if its gate wants to:
    a span ends where the gate no longer asks. The tokens are granted if the bound still holds after the
    last of them, so it holds inside them too.
    """

    def __init__(
        self,
        budget: Bounds,
        span_tokens: int,
        ask_tokens: int | None = None,
        spent: int = 0,
        calls: int = 0,
        prices: TokenPrices | None = None,
        least: TokenPrices | None = None,
    ) -> None:
        """Create the bucket of one request.

        Args:
            budget: the bound that the bucket enforces.
            span_tokens: longest span, and the credit that a fraction starts with.
            ask_tokens: tokens of one teacher call; None for a whole span.
            spent: teacher tokens so far.
            calls: teacher calls so far.
            prices: prices of the teacher, or of the dearest of several; needed if the budget has a cost.
            least: prices of the cheapest teacher; None: the same as ``prices``.

        Raises:
            ValueError: a call is longer than a span or shorter than a token, or needed prices are missing.
        """
        self.budget = budget
        self.span_tokens = span_tokens
        self.ask_tokens: int = span_tokens if ask_tokens is None else ask_tokens
        self.spent = spent
        self.calls = calls
        if not 1 <= self.ask_tokens <= span_tokens:
            raise ValueError(f"cannot ask for {self.ask_tokens} tokens of a span of {span_tokens}")
        self._priced: _Priced | None = None
        if budget.cost is not None:
            if prices is None:
                raise ValueError("a budget with a cost needs prices")
            self._priced = _Priced(prices, picos(budget.cost), least or prices)

    def earliest(self, reads: int = 0) -> int | None:
        """Completion length from which a span may start; None if no span may start any more.

        ``reads``: tokens that a call would read now. Later calls read at least as many.
        """
        budget = self.budget
        if budget.is_zero or self.tokens_left == 0 or self.calls_left == 0:
            return None
        if self._priced is not None and self._priced.least.affordable(self._priced.left, reads, 1) < 1:
            return None
        if budget.fraction is None or budget.fraction == 1.0:
            return 0
        # spent + ask <= fraction * (length + ask) + span
        return self._length(self.spent + self.ask_tokens - self.span_tokens, budget.fraction)

    def spare_from(self) -> int | None:
        """Completion length from which a call fits into the fraction itself, without the span on top.

        None if it never fits, and for budgets without a fraction in (0, 1).
        """
        fraction = self.budget.fraction
        if fraction is None or fraction in (0.0, 1.0):
            return None
        return self._length(self.spent + self.ask_tokens, fraction)

    def _length(self, tokens: int, fraction: float) -> int | None:
        """Least length with ``tokens <= fraction * (length + ask_tokens)``; None if no completion has it."""
        length = tokens / fraction - self.ask_tokens - EPSILON
        if length <= 0:
            return 0  # also for a fraction so small that the length is minus infinity
        return None if length > LONGEST else math.ceil(length)

    def credit(self, completion_tokens: int) -> float:
        """Teacher tokens that the fraction and the initial span still allow at this completion length."""
        fraction = 1.0 if self.budget.fraction is None else self.budget.fraction
        return fraction * completion_tokens + self.span_tokens - self.spent

    def reserve(
        self,
        completion_tokens: int,
        at_most: int,
        *,
        always: bool = False,
        reads: int = 0,
        prices: TokenPrices | None = None,
        whole: bool = False,
    ) -> Grant | None:
        """Reserve a teacher call's tokens after ``completion_tokens`` of the completion.

        A budget that covers all ``at_most`` tokens grants them in one call, whatever the span length.

        Args:
            completion_tokens: the length of the completion now.
            at_most: tokens that the completion has left.
            always: whether the teacher writes without asking the gate. One call may then get all tokens that
                are left, if the budget has neither calls nor a fraction below 1.
            reads: tokens that the call reads.
            prices: prices of the teacher that is called; None: the bucket's.
            whole: whether the call gets all that the budget allows now, and not only ``ask_tokens``.

        Returns:
            The grant; None if the budget has no room for a call.
        """
        earliest = self.earliest(reads)
        if earliest is None or completion_tokens < earliest or at_most < 1:
            return None
        left = at_most if self.tokens_left is None else min(at_most, self.tokens_left)
        if self._priced is not None:
            left = self._priced.affordable(reads, at_most=left, prices=prices)
            if left < 1:
                return None  # another teacher may be cheaper
        if whole:
            left = min(left, self._room(completion_tokens, left))
            if left < 1:
                return None
        one_call = self.budget.fraction in (None, 1.0) and self.budget.calls is None
        if not whole and (not one_call or not (always or left == at_most)):
            left = min(left, self.ask_tokens)
        self.spent += left
        self.calls += 1
        if self._priced is None:
            return Grant(left)
        return self._priced.reserve(reads, left, prices)

    def _room(self, completion_tokens: int, at_most: int) -> int:
        """Tokens that a call may write so that the bound of the fraction holds at its end."""
        fraction = self.budget.fraction
        if fraction is None or fraction == 1.0:
            return at_most
        # spent + n <= fraction * (length + n) + span
        room = (fraction * completion_tokens + self.span_tokens - self.spent) / (1 - fraction)
        return min(at_most, math.floor(room + EPSILON))

    def settle(self, grant: Grant, used: int, cost: int | None = None) -> None:
        """Give back the part of a grant that the teacher did not use.

        Args:
            grant: the grant that `reserve` returned.
            used: tokens of the grant that are in the completion.
            cost: picos that the call cost; None: all that were reserved.

        Raises:
            ValueError: more tokens or more money were used than were granted.
        """
        if not 0 <= used <= grant.tokens:
            raise ValueError(f"a grant of {grant.tokens} tokens cannot be settled with {used}")
        if grant.settled:
            return
        if self._priced is not None and grant.cost is not None:
            self._priced.settle(grant, grant.cost if cost is None else cost)
        grant.settled = True
        self.spent -= grant.tokens - used

    def cancel(self, grant: Grant) -> None:
        """Take back a grant that led to no call."""
        if not grant.settled:
            self.settle(grant, 0, 0)
            self.calls -= 1

    def affordable(self, reads: int, to_write: int) -> float | None:
        """Teacher tokens that the money left still buys if calls cost as much as so far; None without a cost.

        Args:
            reads: tokens that a call reads now.
            to_write: tokens of the completion that are still to be written.
        """
        return None if self._priced is None else self._priced.expected(reads, to_write, self.ask_tokens)

    @property
    def tokens_left(self) -> int | None:
        """Teacher tokens that the budget still allows; None without such a limit."""
        return None if self.budget.tokens is None else self.budget.tokens - self.spent

    @property
    def calls_left(self) -> int | None:
        """Teacher calls that the budget still allows; None without such a limit."""
        return None if self.budget.calls is None else self.budget.calls - self.calls

    @property
    def cost_left(self) -> int | None:
        """Picos that the budget still allows; None without such a limit."""
        return None if self._priced is None else self._priced.left


class _Priced:
    """The part of a bucket that counts money, in picos. A call is reserved at the most that it may cost."""

    def __init__(self, prices: TokenPrices, limit: int, least: TokenPrices) -> None:
        self.prices = prices
        self.least = least
        self.left = limit
        self._reserved = 0
        self._charged = 0

    def affordable(self, reads: int, at_most: int, prices: TokenPrices | None) -> int:
        return (prices or self.prices).affordable(self.left, reads, at_most)

    def reserve(self, reads: int, writes: int, prices: TokenPrices | None) -> Grant:
        cost = (prices or self.prices).most(reads, writes)
        self.left -= cost
        return Grant(writes, cost, self.prices.most(reads, writes))

    def settle(self, grant: Grant, cost: int) -> None:
        reserved = grant.cost or 0
        if not 0 <= cost <= reserved:
            raise ValueError(f"a call of at most {reserved} picos cannot have cost {cost}")
        self.left += reserved - cost
        self._reserved += grant.planned
        self._charged += cost

    def expected(self, reads: int, to_write: int, ask_tokens: int) -> float:
        """See `Bucket.affordable`. Only past calls show how much of a prompt the teacher's cache has."""
        if self.prices.affordable(self.left, reads, to_write) == to_write:
            return to_write  # in one call
        share = self._charged / self._reserved if self._reserved else 1.0
        a_call = share * self.prices.most(reads + to_write // 2, ask_tokens)
        return self.left / a_call * ask_tokens if a_call else math.inf
