"""Many calls to a teacher that serves few at once, with the real client: a queue is load, not failure."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from server.teacher.ask import Ask
from server.teacher.breaker import Breaker
from server.teacher.client import Teacher
from server.teacher.errors import TeacherError
from server.teacher.pool import TeacherPool
from server.vllm_api import SamplingParams
from tests.helpers.fake_teacher import Server, body, choice

pytestmark = pytest.mark.steady_time

AT_ONCE, SECONDS, TIMEOUT = 2, 0.02, 1.0
CALLS = 200
"""Number of calls. In one queue they take 2 s, longer than the timeout."""


@asynccontextmanager
async def busy_pool() -> AsyncIterator[tuple[TeacherPool, Counter[str]]]:
    """A pool with a teacher that serves two calls at once, and counts of its use."""
    places, used = asyncio.Semaphore(AT_ONCE), Counter()

    async def answer(request: web.Request) -> web.Response:
        async with places:
            await asyncio.sleep(SECONDS)
            used["served"] += 1
        return await body(choice([7]))(request)

    async with Server() as server:
        server.answers = [answer]
        teacher = Teacher(server.url, model="big", timeout=TIMEOUT, breaker=Breaker(1, 60.0), vocabulary=100)
        async with TeacherPool([teacher], concurrency=1024, queue_seconds=0.05) as pool:
            for replica in pool.replicas:
                replica.up = replica.checked = True
            yield pool, used


async def outcome(pool: TeacherPool, number: int) -> str:
    """The outcome of one call."""
    slot = None
    try:
        slot = await pool.admit(number.to_bytes(2))
        ask = Ask([1, 2], 1, SamplingParams())
        async for _ in pool.write(slot, ask, request_id=str(number)):
            pass
    except TeacherError as error:
        return error.reason
    finally:
        if slot is not None:
            slot.release()
    return "ok"


async def test_a_queue_is_no_failure_and_becomes_shorter() -> None:
    async with busy_pool() as (pool, used):
        (replica,) = pool.replicas
        first = Counter(await asyncio.gather(*(outcome(pool, number) for number in range(CALLS))))
        assert set(first) == {"ok", "saturated"}
        assert first["ok"] >= AT_ONCE * TIMEOUT / SECONDS / 4
        assert replica.crowding.limit <= CALLS / 2
        assert not replica.teacher.breaker.tripped
        assert replica.running == 0

        served, later = used["served"], Counter()
        for _ in range(3):
            later += Counter(await asyncio.gather(*(outcome(pool, number) for number in range(CALLS))))
        assert set(later) == {"ok", "saturated"}
        assert later["ok"] >= 0.8 * (used["served"] - served), "hardly a call is served for nobody"
        assert not replica.teacher.breaker.tripped
