"""The ledger in numbers that can be computed by hand."""

import asyncio
import subprocess
import sys

import pytest
from pydantic import TypeAdapter, ValidationError

from router.ledger import (
    Charge,
    CostPerWindow,
    Denial,
    FractionOfTraffic,
    Lease,
    LedgerConfig,
    MemoryLedger,
    RedisLedgerConfig,
    Scope,
    TokensPerWindow,
)
from tests.helpers.ledger_machine import Clock
from tests.helpers.paths import ROOT

MINUTE = Scope("tenant", "acme", TokensPerWindow(tokens=100, window_seconds=60))
QUARTER = Scope("global", "", FractionOfTraffic(fraction=0.25, window_seconds=60, slack_tokens=8))


@pytest.fixture
def clock() -> Clock:
    """A clock that starts at the beginning of a sub-window of one second."""
    clock = Clock()
    clock.ms = 1_000_000_000
    return clock


@pytest.fixture
def ledger(clock: Clock) -> MemoryLedger:
    return MemoryLedger(lease_seconds=30, clock=clock)


async def spend(ledger: MemoryLedger, scope: Scope, tokens: int) -> None:
    lease = await ledger.reserve([scope], tokens)
    assert isinstance(lease, Lease)
    assert await ledger.settle(lease, tokens) == "settled"


async def test_a_settled_span_charges_only_used_tokens(ledger: MemoryLedger) -> None:
    lease = await ledger.reserve([MINUTE], 60)
    assert isinstance(lease, Lease)
    (status,) = await ledger.status([MINUTE])
    assert (status.spent, status.reserved, status.remaining) == (0, 60, 40)
    assert await ledger.settle(lease, 10) == "settled"
    (status,) = await ledger.status([MINUTE])
    assert (status.spent, status.reserved, status.remaining) == (10, 0, 90)


async def test_settling_again_changes_nothing(ledger: MemoryLedger) -> None:
    lease = await ledger.reserve([MINUTE], 60)
    assert await ledger.settle(lease, 10) == "settled"
    assert await ledger.settle(lease, 60) == "unknown"
    (status,) = await ledger.status([MINUTE])
    assert (status.spent, status.reserved) == (10, 0)


async def test_all_scopes_or_none(ledger: MemoryLedger) -> None:
    """The global scope has room for n <= 1/4 n + 8 tokens, that is 10."""
    reply = await ledger.reserve([MINUTE, QUARTER], 11)
    assert isinstance(reply, Denial)
    assert (reply.scope, reply.label) == (QUARTER, "global_fraction")
    statuses = await ledger.status([MINUTE, QUARTER])
    assert [status.reserved for status in statuses] == [0, 0]


async def test_the_rest_is_granted_if_less_is_enough(ledger: MemoryLedger) -> None:
    await spend(ledger, MINUTE, 95)
    assert isinstance(await ledger.reserve([MINUTE], 8), Denial)
    lease = await ledger.reserve([MINUTE], 8, at_least=1)
    assert isinstance(lease, Lease)
    assert lease.tokens == 5
    denial = await ledger.reserve([MINUTE], 8, at_least=1)
    assert isinstance(denial, Denial)
    assert denial.label == "tenant_tokens"


async def test_a_fraction_counts_the_tokens_of_both_models(ledger: MemoryLedger) -> None:
    """n <= 1/4 (60 + n) + 8 for n = 30: 30 <= 22.5 + 8; for n = 31: 31 > 22.75 + 8."""
    await ledger.record([QUARTER], 60)
    lease = await ledger.reserve([QUARTER], 100, at_least=1)
    assert lease.tokens == 30
    await ledger.settle(lease, 30)
    assert isinstance(await ledger.reserve([QUARTER], 1), Denial)
    # 3 more student tokens make room for one teacher token: 31 <= 1/4 (63 + 31) + 8.
    assert isinstance(await ledger.reserve([QUARTER], 1, student_tokens=3), Lease)


@pytest.mark.parametrize(("fraction", "granted"), [(0.0, None), (1.0, 10_000)])
async def test_a_fraction_of_0_allows_nothing_and_1_allows_everything(
    ledger: MemoryLedger, fraction: float, granted: int | None
) -> None:
    """A fraction of 0 allows nothing, not even the slack. 1 allows everything, even without traffic."""
    scope = Scope("global", "", FractionOfTraffic(fraction=fraction, window_seconds=60, slack_tokens=8))
    reply = await ledger.reserve([scope], 10_000, at_least=1)
    assert (reply.tokens if isinstance(reply, Lease) else None) == granted
    if isinstance(reply, Denial):
        assert reply.retry_after_seconds is None


async def test_spent_tokens_leave_the_sliding_window(ledger: MemoryLedger, clock: Clock) -> None:
    """Sub-windows last 1 s. Tokens spent in seconds 0 and 30 are free again after seconds 61 and 91."""
    await spend(ledger, MINUTE, 60)
    clock.ms += 30_000
    await spend(ledger, MINUTE, 40)
    denial = await ledger.reserve([MINUTE], 50)
    assert isinstance(denial, Denial)
    assert denial.retry_after_seconds == 31
    (status,) = await ledger.status([MINUTE])
    assert status.reset_seconds == 61
    clock.ms += 30_999
    assert isinstance(await ledger.reserve([MINUTE], 50), Denial)
    clock.ms += 1
    assert isinstance(await ledger.reserve([MINUTE], 50), Lease)
    (status,) = await ledger.status([MINUTE])
    assert (status.spent, status.total_spent) == (40, 100)


async def test_a_span_that_outlasts_the_window_still_counts(clock: Clock) -> None:
    """Tokens reserved in one window and written in the next are charged to the next when settled."""
    ledger = MemoryLedger(lease_seconds=300, clock=clock)
    lease = await ledger.reserve([MINUTE], 100)
    clock.ms += 120_000
    assert isinstance(await ledger.reserve([MINUTE], 1), Denial)
    await ledger.settle(lease, 100)
    clock.ms += 60_000
    assert isinstance(await ledger.reserve([MINUTE], 1), Denial)
    clock.ms += 1_000
    assert isinstance(await ledger.reserve([MINUTE], 100), Lease)


async def test_a_denial_tells_when_to_ask_again(ledger: MemoryLedger, clock: Clock) -> None:
    assert (await ledger.reserve([MINUTE], 101)).retry_after_seconds is None, "more than there ever is"
    await ledger.reserve([MINUTE], 100)
    clock.ms += 10_000
    assert (await ledger.reserve([MINUTE], 1)).retry_after_seconds == 20, "when the lease ends"
    # 12 - (8 + 4/3) tokens are missing, each needs 3 student tokens, and 60 s bring 1: the whole window.
    assert (await ledger.reserve([QUARTER], 12, student_tokens=1)).retry_after_seconds == 60
    # 8 + 4/3 + 90/3 = 39: two tokens short, 6 student tokens, 90 a minute: 4 s.
    assert (await ledger.reserve([QUARTER], 42, student_tokens=89)).retry_after_seconds == 4


async def test_deadline_lies_before_the_end_of_the_lease(ledger: MemoryLedger, clock: Clock) -> None:
    lease = await ledger.reserve([MINUTE], 100)
    assert lease.deadline == clock() + 24
    clock.ms += 29_999
    assert isinstance(await ledger.reserve([MINUTE], 1), Denial)
    clock.ms += 1
    assert isinstance(await ledger.reserve([MINUTE], 100), Lease)


async def test_a_late_settlement_is_counted_if_leases_are_returned(
    ledger: MemoryLedger, clock: Clock
) -> None:
    lease = await ledger.reserve([MINUTE], 60)
    clock.ms += 31_000
    await spend(ledger, MINUTE, 100)
    assert await ledger.settle(lease, 20) == "late"
    assert await ledger.settle(lease, 20) == "unknown"
    (status,) = await ledger.status([MINUTE])
    assert (status.spent, status.reserved, status.remaining) == (120, 0, 0)
    assert isinstance(await ledger.reserve([MINUTE], 1), Denial)


async def test_expired_lease_is_charged_until_settled(clock: Clock) -> None:
    ledger = MemoryLedger(lease_seconds=30, on_expiry="charge", clock=clock)
    lease = await ledger.reserve([MINUTE], 60)
    clock.ms += 31_000
    (status,) = await ledger.status([MINUTE])
    assert (status.spent, status.reserved) == (60, 0)
    assert isinstance(await ledger.reserve([MINUTE], 41), Denial)
    assert await ledger.settle(lease, 20) == "late"
    (status,) = await ledger.status([MINUTE])
    assert (status.spent, status.total_spent) == (20, 20)


async def test_a_very_late_settlement_is_unknown(ledger: MemoryLedger, clock: Clock) -> None:
    lease = await ledger.reserve([MINUTE], 60)
    clock.ms += 200_000
    assert await ledger.settle(lease, 60) == "unknown"


async def test_limits_may_change_while_tokens_are_out(ledger: MemoryLedger) -> None:
    """A lowered limit binds at once, and spent tokens stay spent."""
    await spend(ledger, MINUTE, 50)
    smaller = Scope("tenant", "acme", TokensPerWindow(tokens=40, window_seconds=60))
    (status,) = await ledger.status([smaller])
    assert (status.spent, status.remaining) == (50, 0)
    assert isinstance(await ledger.reserve([smaller], 1), Denial)


async def test_tenants_and_windows_are_apart(ledger: MemoryLedger) -> None:
    other = Scope("tenant", "other", TokensPerWindow(tokens=100, window_seconds=60))
    hourly = Scope("tenant", "acme", TokensPerWindow(tokens=100, window_seconds=3600))
    await spend(ledger, MINUTE, 100)
    assert isinstance(await ledger.reserve([other, hourly], 100), Lease)


async def test_a_clock_set_back_stands_still(ledger: MemoryLedger, clock: Clock) -> None:
    await spend(ledger, MINUTE, 100)
    clock.ms -= 500_000
    assert isinstance(await ledger.reserve([MINUTE], 1), Denial)


async def test_without_scopes_there_is_no_limit(ledger: MemoryLedger) -> None:
    lease = await ledger.reserve([], 1000)
    assert isinstance(lease, Lease)
    assert await ledger.settle(lease, 1000) == "settled"


@pytest.mark.parametrize(
    ("tokens", "options"), [(0, {}), (5, {"at_least": 6}), (5, {"at_least": 0}), (5, {"student_tokens": -1})]
)
async def test_senseless_reservations_are_refused(
    ledger: MemoryLedger, tokens: int, options: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match="cannot reserve"):
        await ledger.reserve([MINUTE], tokens, **options)


@pytest.mark.parametrize("used", [-1, 9])
async def test_senseless_settlements_are_refused(ledger: MemoryLedger, used: int) -> None:
    lease = await ledger.reserve([MINUTE], 8)
    with pytest.raises(ValueError, match="a lease of 8 tokens cannot be settled"):
        await ledger.settle(lease, used)


CENT = Scope("tenant", "acme", CostPerWindow(cost=0.01, window_seconds=60))
CALL = Charge(fixed=2_000_000, each=100_000)
"""A call reads for 0.002 and writes each token for 0.0001."""


async def test_a_limit_in_money_reserves_reading_and_writing(ledger: MemoryLedger) -> None:
    """Three calls of ten tokens cost 0.009. The rest is half of the price at which the next call reads."""
    leases = [await ledger.reserve([CENT, MINUTE], 10, charge=CALL) for _ in range(3)]
    assert [lease.cost for lease in leases] == [3_000_000] * 3
    denial = await ledger.reserve([CENT, MINUTE], 10, at_least=1, charge=CALL)
    assert isinstance(denial, Denial)
    assert denial.label == "tenant_cost"
    assert await ledger.settle(leases[0], 4, 1_400_000) == "settled"
    money, tokens = await ledger.status([CENT, MINUTE])
    assert (money.spent, money.reserved, money.remaining) == (1_400_000, 6_000_000, 2_600_000)
    assert (tokens.spent, tokens.reserved) == (4, 20)
    assert (money.in_window, money.rate) == (4, None)
    lease = await ledger.reserve([CENT, MINUTE], 10, at_least=1, charge=CALL)
    assert lease.tokens == 6, "0.0026 are reading and six tokens"
    assert (await ledger.status([CENT]))[0].remaining == 0


async def test_money_comes_back_with_the_window(ledger: MemoryLedger, clock: Clock) -> None:
    lease = await ledger.reserve([CENT], 80, charge=CALL)
    await ledger.settle(lease, 80, 10_000_000)
    assert (await ledger.reserve([CENT], 1, charge=CALL)).retry_after_seconds == 61
    assert (await ledger.reserve([CENT], 81, charge=CALL)).retry_after_seconds is None, "more than there is"
    clock.ms += 61_000
    assert isinstance(await ledger.reserve([CENT], 1, charge=CALL), Lease)


async def test_a_call_that_costs_nothing_is_a_lease_all_the_same(ledger: MemoryLedger) -> None:
    lease = await ledger.reserve([CENT], 7)
    assert (lease.tokens, lease.cost) == (7, 1)
    assert await ledger.settle(lease, 7) == "settled"
    with pytest.raises(ValueError, match="cannot be settled with 2"):
        await ledger.settle(lease, 7, 2)


async def test_a_thousand_concurrent_reservations_stay_within_the_limit(ledger: MemoryLedger) -> None:
    """A thousand streams want one token each of 100: a hundred get it."""
    replies = await asyncio.gather(*(ledger.reserve([MINUTE], 1) for _ in range(1000)))
    assert sum(isinstance(reply, Lease) for reply in replies) == 100


def test_a_configuration_builds_its_ledger_or_is_refused() -> None:
    config = TypeAdapter(LedgerConfig)
    assert isinstance(config.validate_python({"type": "memory"}).build(), MemoryLedger)
    redis = config.validate_python({"type": "redis", "url": "redis://cache:6379/2"})
    assert isinstance(redis, RedisLedgerConfig)
    assert redis.when_unavailable == "refuse"
    for wrong in (
        {"type": "redis"},
        {"type": "redis", "url": "http://x"},
        {"type": "redis", "url": "redis://:pass/word@cache:6379"},
        {"type": "memory", "url": "redis://x"},
    ):
        with pytest.raises(ValidationError):
            config.validate_python(wrong)


@pytest.mark.parametrize(
    "limit",
    [
        {"type": "tokens", "tokens": -1, "window_seconds": 60},
        {"type": "tokens", "tokens": 1, "window_seconds": 0.5},
        {"type": "tokens", "tokens": 1, "window_seconds": 60, "fraction": 0.1},
        {"type": "fraction", "fraction": 1.1, "window_seconds": 60},
    ],
)
def test_wrong_limits_are_refused(limit: dict[str, object]) -> None:
    model = TokensPerWindow if limit["type"] == "tokens" else FractionOfTraffic
    with pytest.raises(ValidationError):
        model.model_validate(limit)


def test_the_memory_ledger_needs_no_redis() -> None:
    program = "import sys, router.ledger; print('redis' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"
