"""A choice's share of the budgets of its tenant and of all requests."""

import asyncio
import math
import time
from collections import Counter
from functools import partial
from typing import Any
from unittest.mock import AsyncMock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from router.controller import AIM, EVENLY, PriceController
from router.ledger import CostPerWindow, Denial, FractionOfTraffic, Lease, MemoryLedger, TokensPerWindow
from router.money import TokenPrices, picos
from router.policy import Calibration
from server.shared_budgets import Draw, SharedBudgets, charge_of
from server.tenants import Tenant, hash_key

pytestmark = pytest.mark.steady_time

MINUTE = TokensPerWindow(tokens=100, window_seconds=60)
TENTH = FractionOfTraffic(fraction=0.1, window_seconds=60, slack_tokens=8)


@pytest.fixture
def prices() -> PriceController:
    return PriceController(Calibration(((0.01, 9.0), (0.5, 1.0))), span_tokens=4)


@pytest.fixture
def tenant() -> Tenant:
    return Tenant(name="acme", keys=(hash_key("secret"),), limits=(MINUTE,), priority=0.5)


async def test_without_limits_nothing_is_counted(prices: PriceController) -> None:
    share = SharedBudgets(MemoryLedger(), prices).share(None)
    assert await share.reserve(1000, 50) == Draw(1000, math.inf)
    share.settle(1000)
    share.close(5000)
    assert share.rate == 1.0


async def test_every_student_token_is_recorded_once(prices: PriceController, tenant: Tenant) -> None:
    budgets = SharedBudgets(MemoryLedger(), prices, [TENTH])
    share = budgets.share(tenant)
    assert isinstance(await share.reserve(4, 90), Draw)
    share.settle(3)
    assert isinstance(await share.reserve(4, 100), Draw)
    share.close(130)
    share.close(130)
    await budgets.aclose()
    for status in await budgets.ledger.status(share.scopes):
        assert (status.spent, status.reserved, status.student_tokens) == (3, 0, 130)


async def test_a_grant_is_at_most_what_is_left(prices: PriceController, tenant: Tenant) -> None:
    budgets = SharedBudgets(MemoryLedger(), prices)
    assert (await budgets.share(tenant).reserve(98, 0)).tokens == 98
    assert (await budgets.share(tenant).reserve(8, 0)).tokens == 2
    denial = await budgets.share(tenant).reserve(8, 0)
    assert isinstance(denial, Denial)
    assert denial.label == "tenant_tokens"


async def test_the_price_follows_what_is_spent(prices: PriceController) -> None:
    """Only 4 of 1,000 new tokens were the teacher's, so the rate goes up. A low priority gets half of it."""
    budgets = SharedBudgets(MemoryLedger(), prices, [TENTH])
    lesser = Tenant(name="lesser", keys=(hash_key("secret"),), priority=0.5)
    share, everybody = budgets.share(lesser), budgets.share(None)
    await share.reserve(4, 100)
    share.settle(4)
    await asyncio.sleep(0)
    await budgets.update()
    assert everybody.rate == pytest.approx(AIM * 0.1)
    share.close(1000)
    await asyncio.sleep(0)
    await budgets.update()
    assert everybody.rate > AIM * 0.1
    assert share.rate == pytest.approx(everybody.rate / 2)


async def test_only_used_limits_are_looked_up(prices: PriceController, tenant: Tenant) -> None:
    budgets = SharedBudgets(MemoryLedger(), prices, [TENTH])
    share = budgets.share(tenant)
    assert not await budgets.update()
    await share.reserve(4, 100)
    assert len(await budgets.update()) == 2
    assert not await budgets.update()


async def test_spending_is_followed_until_it_has_left_its_window(
    prices: PriceController, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise metrics would show a used-up budget, with a high price, until the next request."""
    monkeypatch.setattr("server.shared_budgets.IDLE_SECONDS", 0.0)
    now = 0.0
    ledger = MemoryLedger(clock=lambda: now)
    budgets = SharedBudgets(ledger, prices)
    share = budgets.share(tenant)
    await share.reserve(100, 100)
    share.settle(100)
    await asyncio.sleep(0)
    remaining = partial(
        REGISTRY.get_sample_value,
        "wheels_budget_remaining",
        {"scope": "tenant", "tenant": "acme", "limit": "tokens/60s"},
    )
    assert await budgets.update()
    assert remaining() == 0
    now = 30.0
    assert await budgets.update()
    assert remaining() == 0
    monkeypatch.setattr(ledger, "status", AsyncMock(return_value=None))
    assert not await budgets.update()
    monkeypatch.undo()
    now = 70.0
    budgets._idle_at = 0.0
    assert await budgets.update()
    assert remaining() == 100
    budgets._idle_at = 0.0
    assert not await budgets.update()


# Asks that follow closely


class CountingLedger(MemoryLedger):
    """A ledger that counts the calls that would go to Redis over the network."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.calls: Counter[str] = Counter()

    async def reserve(self, *arguments: Any, **options: Any) -> Lease | Denial:
        self.calls["reserve"] += 1
        return await super().reserve(*arguments, **options)

    async def settle(self, lease: Lease, used: int, cost: int = 0) -> str:
        self.calls["settle"] += 1
        return await super().settle(lease, used, cost)


async def books(budgets: SharedBudgets) -> tuple[int, int]:
    """(spent, reserved) under the first limit, after all settlements under way."""
    await asyncio.gather(*budgets._tasks)
    status, *_ = await budgets.ledger.status(budgets.everybody)
    return status.spent, status.reserved


def counting(prices: PriceController, hold_seconds: float = 60.0, **options: Any) -> SharedBudgets:
    return SharedBudgets(CountingLedger(clock=time.monotonic, **options), prices, [MINUTE], hold_seconds)


async def test_asks_that_follow_closely_share_a_lease(prices: PriceController) -> None:
    budgets = counting(prices)
    share = budgets.share(None)
    for asked in range(8):
        assert (await share.reserve(1, asked, ahead=4)).tokens == 1
        share.settle(1)
    assert await books(budgets) == (8, 0)
    assert budgets.ledger.calls == {"reserve": 2, "settle": 2}


async def test_the_rest_of_a_lease_is_kept_for_a_moment(prices: PriceController) -> None:
    budgets = counting(prices, hold_seconds=0.05)
    share = budgets.share(None)
    await share.reserve(1, 0, ahead=4)
    share.settle(1)
    assert await books(budgets) == (0, 4)
    await asyncio.sleep(0.1)
    assert await books(budgets) == (1, 0)
    assert (await share.reserve(1, 9, ahead=4)).tokens == 1
    assert await books(budgets) == (1, 4)


async def test_a_lease_is_not_given_back_while_a_span_is_under_way(prices: PriceController) -> None:
    budgets = counting(prices, hold_seconds=0.05)
    share = budgets.share(None)
    await share.reserve(1, 0, ahead=4)
    share.settle(1)
    await share.reserve(1, 0, ahead=4)
    await asyncio.sleep(0.1)
    assert await books(budgets) == (0, 4)
    share.settle(1)
    share.close(0)
    assert await books(budgets) == (2, 0)


async def test_a_lease_with_too_little_left_makes_room_for_another(prices: PriceController) -> None:
    budgets = counting(prices)
    share = budgets.share(None)
    await share.reserve(4, 0, ahead=6)
    share.settle(4)
    assert (await share.reserve(4, 0, ahead=6)).tokens == 4
    assert await books(budgets) == (4, 6)


async def test_a_span_gets_half_the_time_of_a_lease_at_least(prices: PriceController) -> None:
    budgets = counting(prices, lease_seconds=0.25)
    share = budgets.share(None)
    first = await share.reserve(1, 0, ahead=4)
    share.settle(1)
    assert (await share.reserve(1, 0, ahead=4)).deadline == first.deadline
    share.settle(1)
    await asyncio.sleep(0.11)
    later = await share.reserve(1, 0, ahead=4)
    assert later.deadline >= first.deadline + 0.1
    assert await books(budgets) == (2, 4)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(0, 3), st.booleans()), max_size=60)
)
async def test_shares_at_once_stay_within_the_limit(asks: list[tuple[int, int, int, bool]]) -> None:
    """Three choices ask, write a part of it, and end now and then, each with the rest of its lease."""
    controller = PriceController(Calibration(((0.01, 9.0), (0.5, 1.0))), span_tokens=4)
    limit = TokensPerWindow(tokens=30, window_seconds=3600)
    budgets = SharedBudgets(MemoryLedger(), controller, [limit])
    shares, written = [budgets.share(None) for _ in range(3)], 0
    for number, wanted, used, ends in asks:
        draw = await shares[number].reserve(wanted, 0, ahead=4)
        if isinstance(draw, Draw):
            assert 1 <= draw.tokens <= wanted
            shares[number].settle(min(used, draw.tokens))
            written += min(used, draw.tokens)
        if ends:
            shares[number].close(0)
            shares[number] = budgets.share(None)
        spent, reserved = await books(budgets)
        assert written <= spent + reserved <= 30
    for share in shares:
        share.close(0)
    assert await books(budgets) == (written, 0)


# Settlements


class SlowLedger(MemoryLedger):
    """A ledger that settles after a moment, or not at all."""

    fails = False

    async def settle(self, lease: Lease, used: int, cost: int = 0) -> str:
        await asyncio.sleep(0.01)
        if self.fails:
            raise RuntimeError("no")
        return await super().settle(lease, used, cost)


async def test_settlements_survive_their_request(prices: PriceController, tenant: Tenant) -> None:
    budgets = SharedBudgets(SlowLedger(), prices)
    share = budgets.share(tenant)
    await share.reserve(8, 0)

    async def request() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            share.settle(5)
            share.close(0)

    task = asyncio.create_task(request())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    await budgets.aclose()
    (status,) = await budgets.ledger.status(share.scopes)
    assert (status.spent, status.reserved) == (5, 0)


async def test_a_failed_settlement_is_logged(
    prices: PriceController, tenant: Tenant, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = SlowLedger()
    ledger.fails = True
    budgets = SharedBudgets(ledger, prices)
    share = budgets.share(tenant)
    await share.reserve(8, 0)
    share.settle(8)
    await budgets.aclose()
    await asyncio.sleep(0)
    assert "a grant could not be settled" in caplog.text


# Limits in money

HOUR_OF_MONEY = CostPerWindow(cost=0.001, window_seconds=3600)
CALL = charge_of(TokenPrices(input=2, cached_input=0.5, output=10), 100)
"""A call that reads for 0.0002 and writes each token for 0.00001."""


async def test_every_call_under_a_limit_in_money_has_a_lease_of_its_own(prices: PriceController) -> None:
    """Each call reads again. The first is charged its cost. The second broke off and is charged in full."""
    budgets = SharedBudgets(CountingLedger(), prices, [HOUR_OF_MONEY])
    share = budgets.share(None)
    draw = await share.reserve(4, 0, ahead=8, charge=CALL)
    assert (draw.tokens, draw.cost) == (4, picos(0.00024))
    share.settle(4, picos(0.00015))
    await share.reserve(4, 0, ahead=8, charge=CALL)
    share.settle(1, None)
    assert await books(budgets) == (150_000 + 240_000, 0)
    assert budgets.ledger.calls == {"reserve": 2, "settle": 2}
    assert (await share.reserve(50, 0, charge=CALL)).tokens == 41, "0.00061 are reading and 41 tokens"
    refused = await budgets.share(None).reserve(4, 0, charge=CALL)
    assert refused.label == "global_cost"


async def test_the_price_follows_money_that_is_spent(prices: PriceController) -> None:
    """A teacher token costs 0.00005, so 0.001 pays for a fifth of 100 tokens an hour."""
    budgets = SharedBudgets(MemoryLedger(clock=time.monotonic), prices, [HOUR_OF_MONEY])
    share = budgets.share(None)
    await share.reserve(4, 0, charge=CALL)
    share.settle(4, picos(0.0002))
    share.close(96)
    await asyncio.sleep(0)
    await budgets.update()
    budgets.use(budgets.everybody)
    await budgets.update()
    (controller,) = prices.controllers.values()
    assert prices.token_cost == 50_000
    assert controller.target == pytest.approx(EVENLY * 0.2)
    assert share.rate == pytest.approx(EVENLY * 0.2)
    (status,) = await budgets.ledger.status(budgets.everybody)
    assert (status.in_window, status.total_completion) == (100, 100)


async def test_metrics_of_a_limit_in_money(prices: PriceController) -> None:
    budgets = SharedBudgets(MemoryLedger(), prices, [HOUR_OF_MONEY])
    share = budgets.share(None)
    await share.reserve(4, 0, charge=CALL)
    share.settle(4, picos(0.0002))
    await asyncio.sleep(0)
    await budgets.update()
    labels = {"scope": "global", "tenant": "", "limit": "cost/3600s"}
    assert REGISTRY.get_sample_value("wheels_budget_limit", labels) == 0.001
    assert REGISTRY.get_sample_value("wheels_budget_remaining", labels) == pytest.approx(0.0008)
    assert REGISTRY.get_sample_value("wheels_budget_rate", labels) is None
