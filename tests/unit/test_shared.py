"""A choice's part in the budgets of its tenant and of all."""

import asyncio
import math

import pytest

from router.controller import AIM, PriceController
from router.ledger import Denial, FractionOfTraffic, Lease, MemoryLedger, TokensPerWindow
from router.policy import Calibration
from server.shared import SharedBudgets
from server.tenants import Tenant, hash_key

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
    lease = await share.reserve(1000, 50)
    assert isinstance(lease, Lease)
    assert (lease.tokens, lease.deadline) == (1000, math.inf)
    share.settle(lease, 1000)
    share.close(5000)
    assert share.rate == 1.0


async def test_every_student_token_is_recorded_once(prices: PriceController, tenant: Tenant) -> None:
    budgets = SharedBudgets(MemoryLedger(), prices, [TENTH])
    share = budgets.share(tenant)
    lease = await share.reserve(4, 90)
    share.settle(lease, 3)
    assert isinstance(await share.reserve(4, 100), Lease)
    share.close(130)
    share.close(130)
    await budgets.aclose()
    for status in await budgets.ledger.status(share.scopes):
        assert (status.spent, status.reserved, status.student_tokens) == (3, 4, 130)


async def test_what_is_left_is_granted_and_no_more(prices: PriceController, tenant: Tenant) -> None:
    share = SharedBudgets(MemoryLedger(), prices).share(tenant)
    assert (await share.reserve(98, 0)).tokens == 98
    assert (await share.reserve(8, 0)).tokens == 2
    denial = await share.reserve(8, 0)
    assert isinstance(denial, Denial)
    assert denial.label == "tenant_tokens"


async def test_the_price_follows_what_is_spent(prices: PriceController) -> None:
    """Of 1,000 new tokens none but 4 were the teacher's: the rate goes up. A low priority gets half of it."""
    budgets = SharedBudgets(MemoryLedger(), prices, [TENTH])
    lesser = Tenant(name="lesser", keys=(hash_key("secret"),), priority=0.5)
    share, everybody = budgets.share(lesser), budgets.share(None)
    share.settle(await share.reserve(4, 100), 4)
    await budgets.update()
    assert everybody.rate == pytest.approx(AIM * 0.1)
    share.close(1000)
    await asyncio.sleep(0)
    await budgets.update()
    assert everybody.rate > AIM * 0.1
    assert share.rate == pytest.approx(everybody.rate / 2)


async def test_only_what_is_used_is_looked_at(prices: PriceController, tenant: Tenant) -> None:
    budgets = SharedBudgets(MemoryLedger(), prices, [TENTH])
    share = budgets.share(tenant)
    assert not await budgets.update()
    await share.reserve(4, 100)
    assert len(await budgets.update()) == 2
    assert not await budgets.update()


class SlowLedger(MemoryLedger):
    """Settles after a moment, or not at all."""

    fails = False

    async def settle(self, lease: Lease, used: int) -> str:
        await asyncio.sleep(0.01)
        if self.fails:
            raise RuntimeError("no")
        return await super().settle(lease, used)


async def test_settlements_survive_their_request(prices: PriceController, tenant: Tenant) -> None:
    budgets = SharedBudgets(SlowLedger(), prices)
    share = budgets.share(tenant)
    lease = await share.reserve(8, 0)

    async def request() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            share.settle(lease, 5)

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
    share.settle(await share.reserve(8, 0), 5)
    await budgets.aclose()
    await asyncio.sleep(0)
    assert "a settlement failed" in caplog.text
