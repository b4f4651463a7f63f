"""The Redis ledger against a real redis-server: interleavings, processes that die."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from redis import Redis as SyncRedis

from measuring.pair import free_port
from router.ledger import Lease, Scope
from router.ledger.redis import RedisLedger
from tests.helpers import ledger_worker as worker
from tests.helpers.ledger_machine import LEASE_SECONDS, Clock, LedgerMachine
from tests.helpers.paths import ROOT
from tests.helpers.redis_ledgers import RATE, TENANT, Connect, T, until
from tests.helpers.redis_server import RedisServer


class RedisMachine(LedgerMachine):
    """The ledger machine on Redis. Every example has a prefix, and so a state, of its own.

    A restart also empties Redis's cache of scripts.
    """

    url = ""
    examples = 0

    def open(self) -> RedisLedger:
        type(self).examples += 1
        self.prefix = f"example{self.examples}"
        self.runner = asyncio.Runner()
        return self.connect()

    def connect(self) -> RedisLedger:
        async def connect() -> RedisLedger:
            return RedisLedger.connect(
                self.url,
                prefix=self.prefix,
                lease_seconds=LEASE_SECONDS,
                on_expiry=self.on_expiry,
                timeout=20.0,
                clock=self.clock,
            )

        return self.run(connect())

    def reopen(self) -> RedisLedger:
        super().close()
        with SyncRedis.from_url(self.url) as redis:
            redis.script_flush()
        return self.connect()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    def close(self) -> None:
        super().close()
        self.runner.close()


class ChargingRedisMachine(RedisMachine):
    on_expiry = "charge"


@pytest.mark.parametrize("machine", [RedisMachine, ChargingRedisMachine])
def test_no_interleaving_exceeds_the_bound_or_leaks_tokens(
    machine: type[RedisMachine], redis_server: RedisServer
) -> None:
    machine.url = redis_server.url
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=100,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@contextmanager
def gateways(url: str, count: int, directory: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Worker processes that wait for the end of their input; their output goes to DIRECTORY/0, 1, …"""
    processes = []
    try:
        for i in range(count):
            with (directory / str(i)).open("wb") as output:
                command = [sys.executable, "-m", worker.__name__, url, str(i)]
                processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, cwd=ROOT))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def lines(directory: Path, i: int) -> list[str]:
    """The lines that a worker printed, without one that its death cut short."""
    return (directory / str(i)).read_text().split("\n")[:-1]


async def test_four_gateways_stay_within_the_limit_though_two_are_killed(
    redis_server: RedisServer, tmp_path: Path, connect: Connect
) -> None:
    """Two of four processes die during thousands of reservations at once: not a token is over the limit."""
    ledger = connect(redis_server, lease_seconds=worker.LEASE_SECONDS)
    limit = worker.EVERYBODY.limit.tokens
    highest = 0

    async def everybody():  # type: ignore[no-untyped-def]
        nonlocal highest
        (status,) = await ledger.status([worker.EVERYBODY])
        highest = max(highest, status.spent + status.reserved)
        assert highest <= limit
        return status

    async def half_spent() -> bool:
        return (await everybody()).spent > limit / 2

    async def all_started() -> bool:
        return all(lines(tmp_path, i) for i in range(4))

    with gateways(redis_server.url, 4, tmp_path) as processes:
        await until(all_started, 240)
        for process in processes:
            assert process.stdin
            process.stdin.close()
        await until(half_spent, 240)
        for victim in processes[:2]:
            victim.send_signal(signal.SIGKILL)
            victim.wait()
        held = (await everybody()).reserved
        assert held > 0

        async def all_spent() -> bool:
            status = await everybody()
            return status.spent == limit and status.reserved == 0

        # The survivors go on until the last token is spent, the dead processes' tokens included.
        await until(all_spent, 240)
        assert await ledger.status([worker.TENANT]) is not None
    # The dead processes' tokens came back within their lease: a refused survivor asks every 0.2 s.
    settled = [[int(line) for line in lines(tmp_path, i) if line != "-"] for i in range(4)]
    assert sum(map(len, settled)) > 3000
    assert all(settled), "every gateway got its share"
    # A killed worker may have settled one span per stream, at most, without printing it.
    unsaid = limit - sum(map(sum, settled))
    assert 0 <= unsaid <= 2 * worker.STREAMS * 8


async def test_leases_of_dead_gateways_come_back_in_time(redis_server: RedisServer, connect: Connect) -> None:
    clock = Clock()
    dead = connect(redis_server, lease_seconds=1.0, clock=clock)
    alive = connect(redis_server, lease_seconds=1.0, clock=clock)
    assert isinstance(await dead.reserve([TENANT, RATE], 8), Lease)
    assert isinstance(await dead.reserve([TENANT], 92), Lease)
    await dead._client.aclose()  # a killed process closes its connections and does nothing else

    async def free() -> bool:
        return isinstance(await alive.reserve([TENANT, RATE], 8), Lease)

    assert not await free()
    clock.ms += 990
    assert not await free()
    clock.ms += 20
    assert await free()


async def test_the_time_is_redis_own(redis_server: RedisServer, connect: Connect) -> None:
    """A lease ends by Redis's clock. Its holder's deadline is safely before that."""
    ledger = connect(redis_server, lease_seconds=10.0)
    before, begun = time.monotonic(), time.time()
    lease = await ledger.reserve([TENANT], 8)
    after, ended = time.monotonic(), time.time()
    assert before + 8 <= lease.deadline <= after + 8
    (expiry,) = (
        score
        for _, score in SyncRedis.from_url(redis_server.url).zrange(
            _key(TENANT, "leases"), 0, -1, withscores=True
        )
    )
    assert begun + 10 - 0.001 <= expiry / 1000 <= ended + 10


def _key(scope: Scope, part: str) -> str:
    return f"{{wheels}}:{scope.id}:{part}"


async def test_all_keys_have_one_slot_in_a_cluster(tmp_path: Path, connect: Connect) -> None:
    server = RedisServer(tmp_path, "--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    try:
        server.command("cluster", "addslotsrange", "0", "16383")
        ledger = connect(server, cluster=True)

        async def up() -> bool:
            return "cluster_state:ok" in server.command("cluster", "info")

        await until(up, 20)
        lease = await ledger.reserve([TENANT, RATE], 8)
        assert isinstance(lease, Lease)
        assert await ledger.settle(lease, 5) == "settled"
        assert await ledger.settle(lease, 5) == "unknown"
        await ledger.record([TENANT, RATE], 100)
        statuses = await ledger.status([TENANT, RATE])
        assert [(s.spent, s.reserved, s.student_tokens) for s in statuses] == [(5, 0, 100)] * 2
    finally:
        server.stop()


async def test_idle_scopes_vanish(redis_server: RedisServer, connect: Connect) -> None:
    """Every key has a time to live of two windows and a lease. The totals have one more window."""
    ledger = connect(redis_server, lease_seconds=10.0)
    await ledger.reserve([TENANT], 8)
    for part, windows in (("state", 3), ("held", 2), ("leases", 2)):
        left = int(redis_server.command("pttl", _key(TENANT, part)))
        assert windows * 3_600_000 < left <= windows * 3_600_000 + 10_000
