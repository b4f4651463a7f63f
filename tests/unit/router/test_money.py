"""Prices and costs, and the budget of a request in money."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from router.budget import Bucket, Budget
from router.money import PICOS, TokenPrices, TokenUsage, nanos, nanos_of, picos
from router.policy import Calibration, Policy

PRICES = TokenPrices(input=2, cached_input=0.5, output=10)
"""In millionths, a read token costs 2, a cached one 0.5, and a written one 10."""


def test_amounts_are_exact_to_the_last_digit() -> None:
    """A binary fraction would turn 0.3 into 299999999999."""
    assert picos(0.3) == 300_000_000_000
    assert picos(1e-12) == 1
    assert picos(1.9e-12) == 1, "what may be spent is rounded down"
    assert nanos(0.1) == 100_000_000
    assert (nanos_of(1000), nanos_of(1001)) == (1, 2), "a cost is rounded up"


def test_a_price_of_fractions_of_a_cent_is_exact() -> None:
    prices = TokenPrices(input=0.0375, output=0.15)
    assert prices.cost(TokenUsage(input=1_000_000)) == 37_500_000_000 == picos(0.0375)
    assert prices.of_one.cached_input == prices.of_one.input
    assert TokenPrices(input=0.0000001, output=0).of_one.input == 1, "never less than it is"


def test_a_calls_cost_is_the_sum_over_its_kinds_of_tokens() -> None:
    """100 tokens are read, 60 of them cached, and 4 written: 40 · 2 + 60 · 0.5 + 4 · 10 millionths."""
    assert PRICES.cost(TokenUsage.of(100, 60, 4)) == 150 * PICOS // 10**6
    assert PRICES.most(100, 4) == 240 * PICOS // 10**6
    assert PRICES.affordable(picos(0.00024), 100, 9) == 4
    assert PRICES.affordable(picos(0.000199), 100, 9) == 0, "reading alone costs 0.0002"
    assert TokenPrices(input=2, output=0).affordable(picos(0.0002), 100, 9) == 9


@pytest.mark.parametrize(
    "prices",
    [
        {"input": 1, "cached_input": 2, "output": 1},
        {"input": -1, "output": 1},
        {"input": math.inf, "output": 1},
        {"input": 1},
        {"input": 1, "output": 1, "cache": 1},
    ],
)
def test_wrong_prices_are_refused(prices: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        TokenPrices.model_validate(prices)


@pytest.mark.parametrize("cost", [-0.1, math.nan, math.inf, True, "1", 1e7])
def test_wrong_costs_are_refused(cost: object) -> None:
    with pytest.raises(ValidationError):
        Budget.model_validate({"cost": cost})


def test_a_cost_without_prices_cannot_be_kept() -> None:
    with pytest.raises(ValueError, match="needs prices"):
        Bucket(Budget(cost=1.0), 4)


def test_a_call_is_reserved_as_if_nothing_were_cached_and_settled_at_what_it_cost() -> None:
    bucket = Bucket(Budget(cost=0.001), 4, prices=PRICES)
    grant = bucket.reserve(0, 4, reads=100)
    assert grant is not None
    assert (grant.tokens, grant.cost) == (4, picos(0.00024))
    assert bucket.cost_left == picos(0.00076)
    bucket.settle(grant, 4, PRICES.cost(TokenUsage.of(100, 60, 4)))
    assert bucket.cost_left == picos(0.00085)
    bucket.settle(grant, 0, 0)  # settling again has no effect
    assert bucket.cost_left == picos(0.00085)


def test_a_call_that_broke_off_counts_in_full_and_one_that_was_not_made_not_at_all() -> None:
    bucket = Bucket(Budget(cost=0.001), 4, prices=PRICES)
    lost = bucket.reserve(0, 4, reads=100)
    never = bucket.reserve(0, 4, reads=100)
    bucket.settle(lost, 0)
    bucket.cancel(never)
    assert bucket.cost_left == picos(0.00076)
    with pytest.raises(ValueError, match="cannot have cost"):
        bucket.settle(bucket.reserve(0, 4, reads=100), 4, picos(0.01))


def test_reading_may_leave_money_for_fewer_tokens_or_for_none() -> None:
    bucket = Bucket(Budget(cost=0.00023), 4, prices=PRICES)
    assert bucket.earliest(reads=100) == 0
    assert bucket.earliest(reads=111) is None, "222 for reading leave 8 of 10 for a token"
    assert bucket.reserve(0, 50, reads=100).tokens == 3
    assert bucket.earliest(reads=1) is None


def test_money_for_all_that_is_left_is_one_call() -> None:
    """Calls of one token each would read the whole prefix again and again."""
    bucket = Bucket(Budget(cost=0.001), 4, 1, prices=PRICES)
    assert bucket.reserve(0, 50, reads=100).tokens == 50


def test_all_parts_of_a_budget_hold() -> None:
    bucket = Bucket(Budget(cost=0.001, tokens=2), 4, prices=PRICES)
    assert bucket.reserve(0, 50, reads=100).tokens == 2
    assert bucket.earliest(reads=100) is None
    assert Budget(cost=0.0, tokens=2).is_zero


def test_the_price_follows_the_money_that_is_left() -> None:
    """Half as much money gives about half the rate. A cache that halves the cost raises it again."""
    policy = Policy(Calibration(((0.01, 9.0), (0.99, 1.0))), expected_tokens=100)

    def rate(cost: float, reads: int = 100) -> float:
        return policy._planned(Bucket(Budget(cost=cost), 4, prices=PRICES), 0, 200, reads)

    # A call reads 150 tokens on average: 300 + 40 millionths for 4 tokens.
    assert rate(0.00068) == pytest.approx(2 * 4 / 100, rel=0.01)
    assert rate(0.00034) == pytest.approx(1 * 4 / 100, rel=0.01)
    assert rate(0.0012) == 1, "one call for all of it: 100 tokens are read and 100 written"
    bucket = Bucket(Budget(cost=0.00068 + 0.00012), 4, prices=PRICES)
    bucket.settle(bucket.reserve(0, 4, reads=100), 4, picos(0.00012))  # half of the 0.00024 reserved
    assert policy._planned(bucket, 0, 200, 100) == pytest.approx(4 * 4 / 100, rel=0.01)


@given(
    cost=st.integers(0, 3000),
    prices=st.tuples(st.integers(0, 20), st.integers(0, 50)),
    calls=st.lists(st.tuples(st.integers(0, 100), st.integers(1, 12), st.floats(0, 1), st.floats(0, 1))),
)
def test_the_cost_is_never_exceeded(
    cost: int, prices: tuple[int, int], calls: list[tuple[int, int, float, float]]
) -> None:
    """The bound holds whatever is cached and however much of a grant is written, also with calls at once."""
    teacher = TokenPrices(input=prices[0], cached_input=prices[0] / 2, output=prices[1])
    bucket = Bucket(Budget(cost=cost / 10**6), 4, 2, prices=teacher)
    spent = 0
    open_grants = []
    for reads, at_most, cached, written in calls:
        grant = bucket.reserve(0, at_most, reads=reads)
        if grant is None:
            continue
        used = round(written * grant.tokens)
        usage = TokenUsage.of(reads, round(cached * reads), used)
        spent += teacher.cost(usage)
        assert spent <= picos(cost / 10**6)
        open_grants.append((grant, used, teacher.cost(usage)))
        if len(open_grants) == 3:
            for each in open_grants:
                bucket.settle(*each)
            open_grants = []
    for each in open_grants:
        bucket.settle(*each)
    assert bucket.cost_left == picos(cost / 10**6) - spent
