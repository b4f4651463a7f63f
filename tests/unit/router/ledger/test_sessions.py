"""Sessions in the ledger of one gateway, in numbers that can be computed by hand."""

import pytest

from router.ledger import Charge, Denial, Lease, MemoryLedger, OpenedSession, Scope, Session, SessionProblem
from tests.helpers.ledger_machine import Clock

HOUR = 3_600_000


def session(
    name: str = "run-7",
    *,
    tokens: int | None = None,
    nanos: int | None = None,
    owner: str = "acme",
    most: int = 2,
) -> Session:
    return Session(owner, name, tokens, nanos, idle_ms=HOUR, most=most)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(clock: Clock) -> MemoryLedger:
    return MemoryLedger(lease_seconds=30, clock=clock)


async def opened(ledger: MemoryLedger, session: Session) -> tuple[Scope, ...]:
    answer = await ledger.open_session(session)
    assert isinstance(answer, OpenedSession)
    return session.scopes(answer)


async def test_the_first_request_sets_the_budget_and_later_ones_may_repeat_it(ledger: MemoryLedger) -> None:
    both = OpenedSession(500, 10_000_000)
    assert await ledger.open_session(session(tokens=500, nanos=10_000_000)) == both
    for later in (session(), session(tokens=500), session(nanos=10_000_000)):
        assert await ledger.open_session(later) == both
    for wrong in (session(tokens=501), session(tokens=500, nanos=1)):
        assert await ledger.open_session(wrong) is SessionProblem.CONFLICT


async def test_a_part_that_was_not_set_is_a_conflict(ledger: MemoryLedger) -> None:
    assert await ledger.open_session(session(tokens=0)) == OpenedSession(0, None)
    assert await ledger.open_session(session(nanos=1)) is SessionProblem.CONFLICT


async def test_a_new_session_needs_a_budget(ledger: MemoryLedger) -> None:
    assert await ledger.open_session(session()) is SessionProblem.UNKNOWN


async def test_every_owner_has_sessions_of_its_own(ledger: MemoryLedger) -> None:
    (mine,) = await opened(ledger, session(tokens=5))
    (others,) = await opened(ledger, session(tokens=8, owner="other"))
    assert isinstance(await ledger.reserve([mine], 5), Lease)
    assert isinstance(await ledger.reserve([others], 8), Lease)


async def test_an_owner_has_a_largest_number_of_sessions(ledger: MemoryLedger, clock: Clock) -> None:
    await ledger.open_session(session("a", tokens=1))
    clock.ms += HOUR - 1
    await ledger.open_session(session("b", tokens=1))
    assert await ledger.open_session(session("c", tokens=1)) is SessionProblem.FULL
    assert isinstance(await ledger.open_session(session("b")), OpenedSession)
    assert isinstance(await ledger.open_session(session("c", tokens=1, owner="other")), OpenedSession)
    clock.ms += 1
    assert isinstance(await ledger.open_session(session("c", tokens=1)), OpenedSession), "a is over"


async def test_both_limits_hold_for_the_whole_session(ledger: MemoryLedger, clock: Clock) -> None:
    """No window gives anything back. Each call here reads for 10 and writes each token for 1."""
    scopes = await opened(ledger, session(tokens=12, nanos=40))
    charge = Charge(10, 1)
    for _ in range(2):
        lease = await ledger.reserve(scopes, 5, charge=charge)
        assert isinstance(lease, Lease)
        await ledger.settle(lease, 5, 15)
        clock.ms += HOUR - 1
    denial = await ledger.reserve(scopes, 1, charge=charge)
    assert isinstance(denial, Denial)
    assert (denial.label, denial.retry_after_seconds) == ("session_cost", None)
    assert isinstance(await ledger.reserve(scopes, 3, charge=Charge(1, 1)), Denial)
    statuses = await ledger.status(scopes)
    assert [(status.spent, status.remaining) for status in statuses] == [(10, 2), (30, 10)]


async def test_a_session_without_use_is_over(ledger: MemoryLedger, clock: Clock) -> None:
    """A request that still runs gets nothing more. The next request with this id starts a new session."""
    scopes = await opened(ledger, session(tokens=5))
    lease = await ledger.reserve(scopes, 5)
    clock.ms += HOUR
    assert isinstance(await ledger.reserve(scopes, 1), Denial)
    assert await ledger.settle(lease, 5) == "unknown"
    assert await ledger.open_session(session()) is SessionProblem.UNKNOWN
    scopes = await opened(ledger, session(tokens=7))
    assert (await ledger.status(scopes))[0].remaining == 7


async def test_a_session_lives_longer_than_any_lease(clock: Clock) -> None:
    ledger = MemoryLedger(lease_seconds=HOUR / 1000, clock=clock)
    scopes = await opened(ledger, session(tokens=5))
    await ledger.reserve(scopes, 5)
    clock.ms += HOUR + 1
    assert (await ledger.status(scopes))[0].remaining == 5, "the lease is over, the session is not"
