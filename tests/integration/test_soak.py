"""Hundreds of streams at once, a tenth of whose clients vanish: nothing is lost, and nothing is left."""

import asyncio
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from client import MODEL, metric, settled

from server.local.pair import HOST, Pair, Serving, free_port, gateway_service
from server.local.processes import Child, running

STREAMS = 500
LIMIT = {"type": "tokens", "tokens": 10**6, "window_seconds": 3600}
BUDGETS = (0.1, 0.3, 1, {"tokens": 5}, 0, None)
GROWTH = 0.05
"""What a process may hold more after a round than after the same round before it."""


@dataclass
class Stream:
    """What one client saw of its answer."""

    tokens: int = 0
    endings: int = 0
    report: dict[str, Any] | None = None


async def watch(http: aiohttp.ClientSession, source: str, budget: Any, leave_after: int | None) -> Stream:
    """Read a stream to its end, or leave after so many chunks."""
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
    """What metrics and ledger say of all requests so far."""

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


def held(child: Child) -> tuple[int, int]:
    """(open files, bytes of memory) of a server and of its engine's processes."""
    parent = psutil.Process(child.process.pid)
    family = [parent, *parent.children(recursive=True)]
    return sum(p.num_fds() for p in family), sum(p.memory_info().rss for p in family)


@pytest.fixture
def limited(stack: Serving, pair: Pair, tmp_path: Path) -> Iterator[tuple[str, Child]]:
    """A gateway whose requests share a limit, so that there is a ledger."""
    url = f"http://{HOST}:{free_port()}"
    service = gateway_service(pair, stack.teacher, url, tmp_path, ("--limits", json.dumps([LIMIT])))
    with running([service], timeout=300) as (child,):
        yield url, child


async def test_five_hundred_streams(
    limited: tuple[str, Child], stack: Serving, sources: Sequence[str]
) -> None:
    url, child = limited
    chance = random.Random(7)
    before = await Books.read(url)
    holdings = []
    for _ in range(3):
        leavers = set(chance.sample(range(STREAMS), STREAMS // 10))
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(url, connector=connector) as http:
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
        assert await settled(url, "wheels_requests_total", requests, seconds=30) == requests
        after = await Books.read(url)
        assert after.errors == 0
        assert after.reserved == 0
        assert (after.spent, after.student_in_ledger) == (after.teacher, after.student)
        # Of those who left, the books know more than they have seen.
        written = after.teacher + after.student - before.teacher - before.student
        assert sum(stream.tokens for stream in stayed) <= written
        assert written <= sum(stream.tokens for stream in stayed) + 96 * len(leavers)
        by_teacher = sum(stream.report["tokens"] for stream in stayed)
        assert by_teacher <= after.teacher - before.teacher
        for server in (url, stack.teacher):
            for queue in ("running", "waiting"):
                assert await settled(server, f"vllm:num_requests_{queue}", 0) == 0
        await asyncio.sleep(5)  # idle connections to the teacher are dropped after 4 s
        holdings.append((held(child), held(stack.teacher_process)))
        before = after

    # The first round is the one that grows pools and caches.
    _, second, third = holdings
    for (files, memory), (files_after, memory_after) in zip(second, third, strict=True):
        assert files_after <= files
        assert memory_after <= memory * (1 + GROWTH)
