"""Sessions and limits in money at a real redis-server, shared by several gateways."""

import asyncio

from router.ledger import (
    Charge,
    CostPerWindow,
    Denial,
    Lease,
    OpenedSession,
    Scope,
    Session,
    SessionProblem,
)
from router.ledger.redis import RedisLedger
from tests.helpers.redis_ledgers import Connect, until
from tests.helpers.redis_server import RedisServer

HOUR = 3_600_000


def session(
    name: str = "run-7",
    *,
    tokens: int | None = None,
    nanos: int | None = None,
    owner: str = "acme",
    idle_ms: int = HOUR,
) -> Session:
    return Session(owner, name, tokens, nanos, idle_ms=idle_ms, most=2)


async def opened(ledger: RedisLedger, session: Session) -> tuple[Scope, ...]:
    answer = await ledger.open_session(session)
    assert isinstance(answer, OpenedSession)
    return session.scopes(answer)


async def test_every_gateway_knows_the_budget(redis_server: RedisServer, connect: Connect) -> None:
    one, other = connect(redis_server), connect(redis_server)
    assert await other.open_session(session()) is SessionProblem.UNKNOWN
    both = OpenedSession(500, 10_000_000)
    assert await one.open_session(session(tokens=500, nanos=10_000_000)) == both
    for later in (session(), session(tokens=500), session(nanos=10_000_000)):
        assert await other.open_session(later) == both
    for wrong in (session(tokens=501), session(tokens=500, nanos=1)):
        assert await other.open_session(wrong) is SessionProblem.CONFLICT
    assert await other.open_session(session("b", tokens=0)) == OpenedSession(0, None)
    assert await one.open_session(session("c", tokens=1)) is SessionProblem.FULL
    assert await one.open_session(session(tokens=8, owner="other")) == OpenedSession(8, None)
    assert await one.open_session(session("b", nanos=1)) is SessionProblem.CONFLICT


async def test_one_of_many_concurrent_first_requests_sets_the_budget(
    redis_server: RedisServer, connect: Connect
) -> None:
    ledgers = [connect(redis_server) for _ in range(4)]
    answers = await asyncio.gather(
        *(ledger.open_session(session(tokens=n)) for n, ledger in enumerate(ledgers * 5))
    )
    (budget,) = {answer for answer in answers if isinstance(answer, OpenedSession)}
    assert answers.count(SessionProblem.CONFLICT) == 19
    assert await ledgers[0].open_session(session()) == budget


async def test_both_limits_hold_at_all_gateways_together(redis_server: RedisServer, connect: Connect) -> None:
    """A call reads for 10 nanos, with half of it cached, and writes 4 of 5 tokens for 2 nanos each."""
    ledgers = [connect(redis_server) for _ in range(4)]
    mine = session(tokens=200, nanos=1000)
    scopes = await opened(ledgers[0], mine)
    costs, written = [], []

    async def work(ledger: RedisLedger) -> None:
        while isinstance(lease := await ledger.reserve(scopes, 5, charge=Charge(10, 2)), Lease):
            costs.append(5 + 8)
            written.append(4)
            assert await ledger.settle(lease, 4, 13) == "settled"

    await asyncio.gather(*(work(ledger) for ledger in ledgers * 8))
    tokens, money = await ledgers[0].status(scopes)
    assert (tokens.spent, tokens.reserved) == (sum(written), 0)
    assert (money.spent, money.reserved) == (sum(costs), 0)
    assert tokens.spent <= 200
    assert money.spent <= 1000
    # The last call was refused for lack of tokens: 49 calls write 196, so 4 are left, and 5 are needed.
    assert isinstance(await ledgers[1].reserve(scopes, 5, charge=Charge(10, 2)), Denial)


async def test_a_session_without_use_vanishes(redis_server: RedisServer, connect: Connect) -> None:
    ledger = connect(redis_server, lease_seconds=0.1)
    mine = session(tokens=5, idle_ms=500)
    scopes = await opened(ledger, mine)
    lease = await ledger.reserve(scopes, 3)
    assert isinstance(lease, Lease)

    async def over() -> bool:
        return redis_server.command("keys", "*acme*") == ""

    await until(over, 20)
    assert isinstance(await ledger.reserve(scopes, 1), Denial), "what still runs gets nothing more"
    assert await ledger.settle(lease, 3) == "unknown"
    assert await over()
    assert await ledger.open_session(session(idle_ms=500)) is SessionProblem.UNKNOWN
    assert await ledger.open_session(session(tokens=9)) == OpenedSession(9, None)


async def test_a_used_session_is_kept(redis_server: RedisServer, connect: Connect) -> None:
    """After each reservation, every key of the session lives on for its idle time."""
    ledger = connect(redis_server)
    scopes = await opened(ledger, session(tokens=5, nanos=100))
    redis_server.command("pexpire", f"{{wheels}}:{scopes[0].id}:state", "5000")
    lease = await ledger.reserve(scopes, 1)
    await ledger.settle(lease, 1)
    for scope in scopes:
        assert int(redis_server.command("pttl", f"{{wheels}}:{scope.id}:state")) > HOUR - 60_000


async def test_without_redis_sessions_are_unknown(redis_server: RedisServer, connect: Connect) -> None:
    ledger = connect(redis_server, timeout=0.5)
    redis_server.stop()
    assert await ledger.open_session(session(tokens=5)) is None
    scopes = session(tokens=5).scopes(OpenedSession(5, None))
    assert (await ledger.reserve(scopes, 1)).label == "unavailable"


async def test_large_amounts_of_money_are_exact(redis_server: RedisServer, connect: Connect) -> None:
    """A million units are 10^15 nanos, and not one is lost."""
    ledger = connect(redis_server)
    million = Scope("global", "", CostPerWindow(cost=1_000_000, window_seconds=3600))
    lease = await ledger.reserve([million], 1, charge=Charge(10**15 - 7, 1))
    assert lease.cost == 10**15 - 6
    assert isinstance(await ledger.reserve([million], 1, charge=Charge(6, 1)), Denial)
    assert isinstance(await ledger.reserve([million], 1, charge=Charge(5, 1)), Lease)
    assert await ledger.settle(lease, 1, 10**15 - 8) == "settled"
    (status,) = await ledger.status([million])
    assert (status.spent, status.reserved, status.in_window) == (10**15 - 8, 6, 1)
