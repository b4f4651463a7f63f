"""The Redis ledger when Redis goes away, hangs, or restarts under load."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from router.ledger import Denial, Lease, Scope, TokensPerWindow
from router.ledger.redis import RedisLedger
from tests.helpers.network import Network
from tests.helpers.redis_ledgers import RATE, TENANT, Connect, T, until
from tests.helpers.redis_server import RedisServer

TIMEOUT = 0.2


def answer(ledger: RedisLedger) -> Coroutine[Any, Any, Lease | Denial]:
    return ledger.reserve([TENANT, RATE], 4)


async def granted(ledger: RedisLedger) -> Lease:
    """A lease as soon as Redis answers: on a busy machine an impatient ledger may have to ask again."""
    while True:
        reply = await answer(ledger)
        if isinstance(reply, Lease) and reply.accounted:
            return reply
        assert isinstance(reply, Lease) or reply.reason == "unavailable"
        await asyncio.sleep(0.1)


async def timed(coroutine: Coroutine[Any, Any, T]) -> tuple[T, float]:
    started = time.perf_counter()
    return await coroutine, time.perf_counter() - started


RETRY = 0.3
IMPATIENT = {"timeout": TIMEOUT, "retry_seconds": RETRY}


class Clock:
    """Measures how long this process itself got no turn: everything may be late by this time."""

    def __init__(self) -> None:
        self.stalled = 0.0

    async def __aenter__(self) -> "Clock":
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    async def _run(self) -> None:
        while True:
            _, seconds = await timed(asyncio.sleep(0.01))
            self.stalled = max(self.stalled, seconds - 0.01)


def counting(ledger: RedisLedger, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that collects the questions that the ledger sends from now on."""
    asked: list[Any] = []
    evaluate = ledger._evaluate

    def counted(*question: Any) -> Coroutine[Any, Any, Any]:
        asked.append(question)
        return evaluate(*question)

    monkeypatch.setattr(ledger, "_evaluate", counted)
    return asked


@pytest.mark.parametrize("rule", ["refuse", "allow"])
@pytest.mark.parametrize("fault", ["gone", "paused"])
async def test_without_redis_reservations_are_refused_or_allowed_as_configured(
    durable_redis: RedisServer, rule: str, fault: str, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reservations are refused or allowed as configured, in time, and at once after three failures."""
    ledger = connect(durable_redis, when_unavailable=rule, **IMPATIENT)
    lease = await granted(ledger)
    if fault == "gone":
        durable_redis.stop()
    else:
        durable_redis.process.send_signal(signal.SIGSTOP)
    asked, waits = counting(ledger, monkeypatch), []
    while len(waits) < 12:
        async with Clock() as clock:
            reply, seconds = await timed(answer(ledger))
        waits.append(seconds)
        assert seconds < TIMEOUT + 0.5 + 2 * clock.stalled
        if rule == "refuse":
            assert isinstance(reply, Denial)
            assert (reply.reason, reply.label, reply.retry_after_seconds) == (
                "unavailable",
                "unavailable",
                RETRY,
            )
        else:
            assert isinstance(reply, Lease)
            assert not reply.accounted
            assert await ledger.settle(reply, 4) == "settled"
    assert len(asked) <= 4 + sum(waits) / RETRY, "an absent Redis is asked only now and then"
    assert not ledger.available
    assert await ledger.status([TENANT]) is None
    async with Clock() as clock:
        outcome, seconds = await timed(ledger.settle(lease, 3))
    assert outcome == "deferred"
    assert seconds < TIMEOUT + 0.5 + 2 * clock.stalled
    await ledger.record([TENANT], 10)

    if fault == "gone":
        durable_redis.start()
    else:
        durable_redis.process.send_signal(signal.SIGCONT)

    async def settled() -> bool:
        statuses = await ledger.status([TENANT])
        return statuses is not None and (statuses[0].spent, statuses[0].reserved) == (3, 0)

    await until(settled, 60)  # the settlement arrived, and refused reservations hold nothing
    assert ledger.available
    await granted(ledger)


async def test_a_gateway_that_is_late_itself_does_not_blame_redis(
    redis_server: RedisServer, connect: Connect
) -> None:
    ledger = connect(redis_server, **IMPATIENT)
    await ledger.status([TENANT])  # connected
    for _ in range(5):
        reply = asyncio.create_task(ledger.reserve([TENANT], 4))
        for _ in range(5):  # turns of the loop until the question is on its way
            await asyncio.sleep(0)
        time.sleep(2 * TIMEOUT)  # noqa: ASYNC251
        assert isinstance(await reply, Lease)
    assert ledger.available


async def test_a_gateway_that_is_always_late_waits_for_a_bounded_time(
    durable_redis: RedisServer, connect: Connect
) -> None:
    ledger = connect(durable_redis, **IMPATIENT)
    await ledger.status([TENANT])
    durable_redis.process.send_signal(signal.SIGSTOP)

    async def stand_still() -> None:
        while True:
            time.sleep(TIMEOUT)  # noqa: ASYNC251
            await asyncio.sleep(0)

    late = asyncio.create_task(stand_still())
    try:
        reply = await asyncio.wait_for(ledger.reserve([TENANT], 4), 20 * TIMEOUT)
    finally:
        late.cancel()
        durable_redis.process.send_signal(signal.SIGCONT)
    assert isinstance(reply, Denial)
    assert reply.reason == "unavailable"


async def test_a_queue_at_the_ledgers_own_connections_is_not_held_against_redis(
    redis_server: RedisServer, connect: Connect
) -> None:
    ledger = connect(redis_server, connections=1, timeout=1.0)
    await granted(ledger)
    async with ledger._connections:
        reply = asyncio.create_task(answer(ledger))
        await asyncio.wait((reply,), timeout=1.5)
    assert isinstance(await reply, Lease)


async def test_a_call_without_a_connection_is_refused_and_redis_counts_as_present(
    redis_server: RedisServer, connect: Connect
) -> None:
    ledger = connect(redis_server, connections=1, **IMPATIENT)
    await granted(ledger)
    async with ledger._connections:
        for reply in await asyncio.gather(*(answer(ledger) for _ in range(5))):
            assert isinstance(reply, Denial)
            assert reply.reason == "unavailable"
    assert ledger.available
    assert not ledger._owed, "what was never sent holds nothing"


TRAFFIC = Scope("global", "", TokensPerWindow(tokens=10**6, window_seconds=3600))


@dataclass
class Traffic:
    """40 streams that reserve and settle until they are stopped, and their results."""

    ledger: RedisLedger
    spent: int = 0
    without: list[Any] = field(default_factory=list)
    """Replies that reserve nothing in Redis: denials, or leases while Redis is away."""
    slowest: float = 0.0
    stop: bool = False

    async def stream(self) -> None:
        while not self.stop:
            reply, seconds = await timed(self.ledger.reserve([TRAFFIC], 5))
            self.slowest = max(self.slowest, seconds)
            if isinstance(reply, Denial) or not reply.accounted:
                self.without.append(reply)
                await asyncio.sleep(0.02)
                continue
            await asyncio.sleep(0.005)
            _, seconds = await timed(self.ledger.settle(reply, 3))
            self.slowest = max(self.slowest, seconds)
            self.spent += 3

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        """Traffic in a block. Afterwards some tokens are spent, some are refused, and nobody waited long."""
        async with Clock() as clock, asyncio.TaskGroup() as group:
            for _ in range(40):
                group.create_task(self.stream())
            yield
            self.stop = True
        assert self.spent > 0
        assert self.without
        assert self.slowest < TIMEOUT + 0.5 + 2 * clock.stalled  # one stall on the way there, one back

    async def exact(self) -> bool:
        """Whether the ledger shows exactly the settled tokens as spent, and nothing as reserved."""
        statuses = await self.ledger.status([TRAFFIC])
        return statuses is not None and (statuses[0].spent, statuses[0].reserved) == (self.spent, 0)


async def test_restart_under_load_loses_nothing(durable_redis: RedisServer, connect: Connect) -> None:
    """Redis is killed and restarted while 40 streams reserve and settle: only settled tokens are spent."""
    traffic = Traffic(connect(durable_redis, **IMPATIENT))
    async with traffic.flowing():
        for _ in range(3):
            await asyncio.sleep(0.4)
            await asyncio.to_thread(durable_redis.stop)
            await asyncio.sleep(0.4)
            await asyncio.to_thread(durable_redis.start)
            await asyncio.sleep(0.4)
    assert all(isinstance(reply, Denial) for reply in traffic.without)
    await until(traffic.exact, 60)


@pytest.mark.parametrize("rule", ["refuse", "allow"])
@pytest.mark.parametrize("fault", ["paused", "partitioned"])
async def test_an_outage_under_load_loses_nothing_and_stops_nobody(
    durable_redis: RedisServer, fault: str, rule: str, connect: Connect
) -> None:
    """Redis is out of reach three times while 40 streams reserve and settle: nobody hangs, nothing is lost.

    No unknown lease holds anything either: a reservation that was given up still arrives when the network is
    back, after the settlement that gave it back.
    """
    options = {"when_unavailable": rule, "lease_seconds": 60.0, **IMPATIENT}
    async with (
        Network(durable_redis.port) as network,
        aclosing(RedisLedger.connect(f"redis://127.0.0.1:{network.port}", **options)) as ledger,
    ):
        traffic = Traffic(ledger)
        async with traffic.flowing():
            for _ in range(3):
                await asyncio.sleep(0.4)
                network.cut() if fault == "partitioned" else durable_redis.process.send_signal(signal.SIGSTOP)
                await asyncio.sleep(0.6)
                network.mend() if fault == "partitioned" else durable_redis.process.send_signal(
                    signal.SIGCONT
                )
                await asyncio.sleep(0.8)
        assert all(isinstance(reply, Denial) is (rule == "refuse") for reply in traffic.without)
        await until(traffic.exact, 60)


async def test_a_reservation_that_arrives_after_its_settlement_holds_nothing(
    redis_server: RedisServer, connect: Connect
) -> None:
    """The reservation was given up while the network was cut. TCP still delivers it afterwards."""
    direct = connect(redis_server)
    async with Network(redis_server.port, straggle=0.0) as network:
        ledger = RedisLedger.connect(f"redis://127.0.0.1:{network.port}", **IMPATIENT)
        lease = await granted(ledger)
        network.cut()
        assert isinstance(await answer(ledger), Denial)
        ((given_up, *_),) = ledger._owed.values()
        for _ in range(2):
            assert await direct.settle(given_up, 0) == "unknown"
        ledger._paying.cancel()  # this task has sent the settlement, on another connection
        ledger._owed.clear()
        network.mend()
        await ledger.settle(await granted(ledger), 2)
        await ledger.settle(lease, 4)
        (status,) = await direct.status([TENANT])
        assert (status.spent, status.reserved) == (6, 0)
        await ledger.aclose()


async def test_a_cancelled_reservation_holds_nothing(redis_server: RedisServer, connect: Connect) -> None:
    """A client leaves while the reservation is under way, at every possible moment."""
    ledger = connect(redis_server, connections=4)
    scope = Scope("global", "", TokensPerWindow(tokens=10**6, window_seconds=3600))
    await ledger.reserve([scope], 1)
    tasks = []
    for i in range(300):
        tasks.append(asyncio.create_task(ledger.reserve([scope], 7)))
        await asyncio.sleep(i % 10 * 0.0001)
        tasks[-1].cancel()
    replies = await asyncio.gather(*tasks, return_exceptions=True)
    for reply in replies:
        if isinstance(reply, Lease):
            await ledger.settle(reply, 0)
    assert any(isinstance(reply, asyncio.CancelledError) for reply in replies)

    async def only_the_first() -> bool:
        (status,) = await ledger.status([scope])
        return (status.spent, status.reserved) == (0, 1)

    await until(only_the_first, 60)
    assert isinstance(await ledger.reserve([scope], 3), Lease), "the connections are in order"


async def test_a_full_redis_counts_as_absent(durable_redis: RedisServer, connect: Connect) -> None:
    """An error reply of Redis permits nothing."""
    ledger = connect(durable_redis, **IMPATIENT)
    await granted(ledger)
    durable_redis.command("config", "set", "maxmemory", "1")
    reply = await answer(ledger)
    assert isinstance(reply, Denial)
    assert reply.reason == "unavailable"
    durable_redis.command("config", "set", "maxmemory", "0")
    await granted(ledger)
