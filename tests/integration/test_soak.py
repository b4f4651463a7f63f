"""Hundreds of streams at once, a tenth of whose clients vanish: nothing is lost, and nothing is left."""

import asyncio
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import psutil
import pytest

from measuring.pair import HOST, START_SECONDS, Pair, Serving, free_port, gateway_service
from measuring.processes import Child, running
from tests.helpers.client import MODEL, UNHURRIED, metric, settled

STREAMS = 500
LIMIT = {"type": "tokens", "tokens": 10**6, "window_seconds": 3600}
BUDGETS = (0.1, 0.3, 1, {"tokens": 5}, 0, None)
UNLIMITED = aiohttp.ClientTimeout(total=None)
GROWTH = 0.05
"""Largest growth of a server's memory from one round to the next, as a share."""


@dataclass
class Stream:
    """The answer as one client saw it."""

    tokens: int = 0
    endings: int = 0
    report: dict[str, Any] | None = None


async def watch(http: aiohttp.ClientSession, source: str, budget: Any, leave_after: int | None) -> Stream:
    """Read a stream to its end, or leave after this many chunks."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": source}], "temperature": 0}
    body |= {"stream": True, "max_tokens": 96, "return_token_ids": True, "teacher_budget": budget}
    seen, chunks = Stream(), 0
    async with http.post("/v1/chat/completions", json=body) as reply:
        async for line in reply.content:
            if leave_after is not None and chunks >= leave_after:
                reply.close()
                return seen
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[len(b"data: ") :])
            chunks += 1
            (choice,) = event["choices"]
            seen.tokens += len(choice.get("token_ids") or ())
            seen.endings += choice["finish_reason"] is not None
            seen.report = event.get("teacher")
    return seen


@dataclass(frozen=True)
class Books:
    """The counts of metrics and ledger for all requests so far."""

    requests: float
    errors: float
    student: float
    teacher: float
    spent: int
    student_in_ledger: int
    reserved: int

    @classmethod
    async def read(cls, url: str) -> "Books":
        async with aiohttp.ClientSession(url) as http, http.get("/budgets") as reply:
            (limit,) = (await reply.json())["budgets"]
        tokens = "wheels_completion_tokens_total"
        return cls(
            metric(url, "wheels_requests_total"),
            metric(url, "wheels_requests_total", outcome="error"),
            metric(url, tokens, source="student"),
            metric(url, tokens, source="teacher"),
            limit["spent"],
            limit["student_tokens"],
            limit["reserved"],
        )


class Holding(NamedTuple):
    """Resources of a server and its engine's processes."""

    connections: int
    """Number of HTTP connections, from clients to a gateway or from it to its teacher."""
    files: int
    """Number of open files that are not such connections."""
    memory: int
    """Memory in bytes."""

    @classmethod
    def of(cls, child: Child, ports: set[int]) -> "Holding":
        """The resources of a server now, if HTTP is spoken on these ports."""
        parent = psutil.Process(child.process.pid)
        connections = files = memory = 0
        for process in (parent, *parent.children(recursive=True)):
            sockets = http_connections(process, ports)
            opened = process.num_fds()
            while (now := http_connections(process, ports)) != sockets:  # one came or went meanwhile
                sockets = now
                opened = process.num_fds()
            connections += len(sockets)
            files += opened - len(sockets)
            memory += process.memory_info().rss
        return cls(connections, files, memory)


def http_connections(process: psutil.Process, ports: set[int]) -> set[int]:
    """File descriptors of connections from or to these ports."""
    connections = process.net_connections("tcp")
    return {c.fd for c in connections if c.raddr and {c.laddr.port, c.raddr.port} & ports}


async def at_rest(child: Child, ports: set[int], probes: int) -> Holding:
    """The resources of a server once its only connections are those by which gateways probe a teacher.

    Idle connections are dropped after some seconds, later on a busy machine. A leaked connection never is.
    """
    deadline = time.monotonic() + 60
    while (holding := Holding.of(child, ports)).connections > probes:
        assert time.monotonic() < deadline, f"{child.service.name} still holds {holding}"
        await asyncio.sleep(0.2)
    return holding


@pytest.fixture
def limited(stack: Serving, pair: Pair, tmp_path: Path) -> Iterator[tuple[str, Child]]:
    """A gateway whose requests share a limit, so that there is a ledger."""
    url = f"http://{HOST}:{free_port()}"
    flags = (*UNHURRIED, "--limits", json.dumps([LIMIT]))
    service = gateway_service(pair, stack.teacher, url, tmp_path, flags)
    with running([service], timeout=START_SECONDS) as (child,):
        yield url, child


async def test_five_hundred_streams_lose_and_leak_nothing(
    limited: tuple[str, Child], stack: Serving, sources: Sequence[str]
) -> None:
    url, child = limited
    ports = {int(server.rpartition(":")[2]) for server in (url, stack.teacher)}
    chance = random.Random(7)
    before = await Books.read(url)
    holdings = []
    for _ in range(3):
        leavers = set(chance.sample(range(STREAMS), STREAMS // 10))
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(url, connector=connector, timeout=UNLIMITED) as http:
            streams = await asyncio.gather(
                *(
                    watch(
                        http,
                        sources[i % len(sources)],
                        BUDGETS[i % len(BUDGETS)],
                        chance.randrange(20) if i in leavers else None,
                    )
                    for i in range(STREAMS)
                )
            )
        stayed = [stream for i, stream in enumerate(streams) if i not in leavers]
        assert [stream.endings for stream in stayed] == [1] * len(stayed)
        assert not any(stream.report["degraded"] for stream in stayed)

        requests = before.requests + STREAMS
        assert await settled(url, "wheels_requests_total", requests) == requests
        after = await Books.read(url)
        assert after.errors == 0
        assert after.reserved == 0
        assert (after.spent, after.student_in_ledger) == (after.teacher, after.student)
        # The books have more tokens than the clients that left have seen.
        written = after.teacher + after.student - before.teacher - before.student
        assert sum(stream.tokens for stream in stayed) <= written
        assert written <= sum(stream.tokens for stream in stayed) + 96 * len(leavers)
        by_teacher = sum(stream.report["tokens"] for stream in stayed)
        assert by_teacher <= after.teacher - before.teacher
        for server in (url, stack.teacher):
            for queue in ("running", "waiting"):
                assert await settled(server, f"vllm:num_requests_{queue}", 0) == 0
        # Both this gateway and the gateway of the stack probe the teacher.
        gateway = await at_rest(child, ports, probes=1)
        teacher = await at_rest(stack.teacher_process, ports, probes=2)
        holdings.append((gateway, teacher))
        before = after

    # In the first round pools and caches grow.
    _, second, third = holdings
    for earlier, later in zip(second, third, strict=True):
        assert later.files <= earlier.files
        assert later.memory <= earlier.memory * (1 + GROWTH)
