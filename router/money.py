"""Money: costs of tokens in whole numbers, so that sums and comparisons are exact."""

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from functools import cached_property
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

PICOS = 10**12
"""Picos in a unit of money: a request counts in picos. A price of 1 per million tokens is 10**6 for one."""
NANOS = 10**9
"""Nanos in a unit of money: a ledger counts in nanos. Its sums are exact up to nine million units."""
MILLION = 10**6
MOST = 1_000_000
"""The highest amount of money in a setting or a request; sums of these stay exact in Redis too."""

Money = Annotated[float, Field(ge=0.0, le=MOST, allow_inf_nan=False)]


def picos(amount: float) -> int:
    """An amount of money that may be spent, in picos, rounded down."""
    return int((Decimal(repr(amount)) * PICOS).to_integral_value(ROUND_FLOOR))


def nanos(amount: float) -> int:
    """An amount of money that may be spent, in nanos, rounded down."""
    return picos(amount) // (PICOS // NANOS)


def nanos_of(cost: int) -> int:
    """The nanos of a cost in picos, rounded up."""
    return -(-cost // (PICOS // NANOS))


@dataclass
class TokenUsage:
    """Tokens that one model read and wrote."""

    input: int = 0
    """Tokens that were read and not found in a prefix cache."""
    cached_input: int = 0
    """Tokens that were read from a prefix cache."""
    output: int = 0
    """Tokens that were written."""

    @classmethod
    def total(cls, usages: Iterable["TokenUsage"]) -> "TokenUsage":
        """The sum of several usages, by kind of token."""
        whole = cls()
        for usage in usages:
            whole.input += usage.input
            whole.cached_input += usage.cached_input
            whole.output += usage.output
        return whole

    @classmethod
    def of(cls, read: int, cached: int, written: int = 0) -> "TokenUsage":
        """The usage of a call that read ``read`` tokens, with ``cached`` of them in a prefix cache."""
        cached = min(max(cached, 0), read)
        return cls(read - cached, cached, written)


class KindCosts(BaseModel):
    """Costs in picos, by kind of token."""

    model_config = ConfigDict(frozen=True)

    input: int
    cached_input: int
    output: int

    @property
    def total(self) -> int:
        """Sum over all kinds of token, in picos."""
        return self.input + self.cached_input + self.output

    @classmethod
    def of_all(cls, costs: Iterable["KindCosts"]) -> "KindCosts":
        """The sum of several costs, by kind of token."""
        whole = (0, 0, 0)
        for each in costs:
            whole = (whole[0] + each.input, whole[1] + each.cached_input, whole[2] + each.output)
        return cls(input=whole[0], cached_input=whole[1], output=whole[2])


class TokenPrices(BaseModel):
    """What a million tokens of one model cost. Digits after the sixth are rounded up."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: Money
    """Price of tokens that are read."""
    cached_input: Money | None = None
    """Price of tokens that are read from a prefix cache; None: as ``input``."""
    output: Money
    """Price of tokens that are written."""

    @model_validator(mode="after")
    def _cache_is_no_dearer(self) -> "TokenPrices":
        if self.cached_input is not None and self.cached_input > self.input:
            raise ValueError("cached_input is more than input")
        return self

    @property
    def rank(self) -> tuple[float, float]:
        """Sort key by which models are ordered from the cheapest to the dearest."""
        return self.output, self.input

    @cached_property
    def of_one(self) -> KindCosts:
        """The cost of one token of each kind."""
        cached = self.input if self.cached_input is None else self.cached_input
        return KindCosts(input=_each(self.input), cached_input=_each(cached), output=_each(self.output))

    def costs(self, usage: TokenUsage) -> KindCosts:
        """What the tokens cost, by kind."""
        one = self.of_one
        return KindCosts(
            input=usage.input * one.input,
            cached_input=usage.cached_input * one.cached_input,
            output=usage.output * one.output,
        )

    def cost(self, usage: TokenUsage) -> int:
        """What the tokens cost, in picos."""
        return self.costs(usage).total

    def most(self, reads: int, writes: int) -> int:
        """The most that a call may cost, in picos: nothing that it reads is in a cache."""
        return reads * self.of_one.input + writes * self.of_one.output

    def affordable(self, cost: int, reads: int, at_most: int) -> int:
        """Tokens that a call may write for ``cost`` picos, if it reads ``reads`` tokens first."""
        left = cost - self.most(reads, 0)
        if left < 0:
            return 0
        each = self.of_one.output
        return at_most if each == 0 else min(at_most, left // each)


FREE = TokenPrices(input=0.0, output=0.0)


class PriceList(BaseModel):
    """Prices of both models, in any one currency."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    student: TokenPrices
    teacher: Annotated[
        Annotated[TokenPrices, Tag("(one)")] | Annotated[dict[str, TokenPrices], Tag("(named)")],
        Discriminator(lambda value: "(named)" if _has_names(value) else "(one)"),
    ]
    """Prices of the teacher, or of several teachers by name. A tool without prices costs nothing."""

    def of_teacher(self, name: str) -> TokenPrices | None:
        """The prices of a teacher; None if it has none."""
        return self.teacher if isinstance(self.teacher, TokenPrices) else self.teacher.get(name)

    @cached_property
    def dearest(self) -> TokenPrices:
        """The prices of the teacher whose tokens cost the most."""
        if isinstance(self.teacher, TokenPrices):
            return self.teacher
        return max(self.teacher.values(), key=lambda prices: prices.rank)


def _has_names(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(entry, dict | TokenPrices) for entry in value.values())


def _each(price: float) -> int:
    """Picos for one token at this price for a million of them."""
    return int((Decimal(repr(price)) * PICOS / MILLION).to_integral_value(ROUND_CEILING))
