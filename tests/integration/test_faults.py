"""The router decides, and requests survive the death of the teacher."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI

from measuring.pair import START_SECONDS, Pair, Serving, serving, teacher_service
from measuring.processes import running
from router.checkpoint import RouterCheckpoint
from tests.helpers.client import PATIENCE, chat, metric, openai_client, settled


@pytest.fixture(scope="module")
def other(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A second gateway, whose router has the sign of its gate turned around."""
    router = RouterCheckpoint.load(pair.router)
    # score' = 0.5 - score: it asks where the student is sure, and not where it is in trouble.
    turned = router.gate | {
        "mlp.4.weight": -router.gate["mlp.4.weight"],
        "mlp.4.bias": 0.5 - router.gate["mlp.4.bias"],
    }
    directory = tmp_path_factory.mktemp("turned")
    RouterCheckpoint(router.config, router.taps, turned).save(directory / "router")
    flags = ("--breaker-seconds", "1", "--cache", str(directory / "cache"))
    with serving(Pair(pair.teacher, pair.student, directory / "router"), directory, flags=flags) as stack:
        yield stack


async def test_the_trained_router_decides(client: AsyncOpenAI, other: Serving, sources: list[str]) -> None:
    """Other weights of the router lead to other spans, so the gateway reads them."""
    ours = await asyncio.gather(*(chat(client, source, 0.2) for source in sources[:40]))
    async with openai_client(other.gateway) as turned:
        theirs = await asyncio.gather(*(chat(turned, source, 0.2) for source in sources[:40]))
    differ = sum(a.teacher["spans"] != b.teacher["spans"] for a, b in zip(ours, theirs, strict=True))
    assert differ >= 30


@pytest.fixture
async def other_client(other: Serving) -> AsyncIterator[AsyncOpenAI]:
    async with openai_client(other.gateway) as client:
        yield client


async def test_requests_survive_the_death_of_the_teacher_under_load(
    other: Serving, other_client: AsyncOpenAI, pair: Pair, sources: list[str], tmp_path: Path
) -> None:
    client = other_client
    requests = [asyncio.create_task(chat(client, source, 0.5)) for source in sources[:200] * 2]
    await asyncio.wait(requests, return_when=asyncio.FIRST_COMPLETED)
    other.teacher_process.signal(signal.SIGKILL)
    other.teacher_process.process.wait()
    replies = await asyncio.wait_for(asyncio.gather(*requests), PATIENCE)
    assert all(reply.choices[0].finish_reason in ("stop", "length") for reply in replies)
    assert sum(reply.teacher["degraded"] for reply in replies) > 100
    assert metric(other.gateway, "wheels_breaker_open") == 1
    async with httpx.AsyncClient(timeout=PATIENCE) as http:
        assert (await http.get(f"{other.gateway}/ready")).status_code == 503
    after = await chat(client, sources[0], 0.5)
    assert after.teacher["degraded"]
    assert after.teacher["calls"] <= 1  # the breaker's trial may be due

    # The teacher comes back at its address: the gateway finds it again by itself.
    with running([teacher_service(pair.teacher, other.teacher, tmp_path)], timeout=START_SECONDS):
        for _ in range(300):
            if not (await chat(client, sources[0], 0.5)).teacher["degraded"]:
                break
            await asyncio.sleep(0.2)
        replies = await asyncio.gather(*(chat(client, source, 0.5) for source in sources[:20]))
        assert not any(reply.teacher["degraded"] for reply in replies)
        assert sum(reply.teacher["tokens"] for reply in replies) > 0
        assert await settled(other.gateway, "wheels_breaker_open", 0) == 0
