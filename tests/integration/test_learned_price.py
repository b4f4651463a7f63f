"""Without a router and without a price, the rates that requests ask for are realised."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from server.local.pair import Pair, Serving, free_port, gateway_service
from server.local.processes import running
from tests.helpers.client import chat, excess, metric, openai_client

WARM_UP = 100
MEASURED = 200
AT_ONCE = 8
SPAN_TOKENS = 4
FRACTIONS = (0.05, 0.3)


async def replies(client: AsyncOpenAI, sources: list[str], fraction: float) -> list[Any]:
    """In the order of the sources, some at a time."""
    places = asyncio.Semaphore(AT_ONCE)

    async def reply(source: str) -> Any:
        async with places:
            return await chat(client, source, fraction)

    return await asyncio.gather(*map(reply, sources))


def realised(answers: list[Any]) -> float:
    teacher = sum(answer.teacher["tokens"] for answer in answers)
    return teacher / sum(answer.usage.completion_tokens for answer in answers)


async def test_after_a_hundred_prompts_the_rate_is_the_budget(
    stack: Serving, pair: Pair, sources: list[str], tmp_path: Path
) -> None:
    """No flag but the place of the cache; and a second start goes on where the first one ended."""
    untrained = Pair(pair.teacher, pair.student, router=None)
    flags = ("--cache", str(tmp_path / "cache"))
    url = f"http://127.0.0.1:{free_port()}"
    service = gateway_service(untrained, stack.teacher, url, tmp_path, flags)
    many = sources * 2
    with running([service], timeout=300):
        async with openai_client(url) as client:
            for fraction in FRACTIONS:
                await replies(client, many[:WARM_UP], fraction)
                answers = await replies(client, many[WARM_UP : WARM_UP + MEASURED], fraction)
                assert realised(answers) == pytest.approx(fraction, abs=0.02), fraction
                assert max(excess(answer, fraction, SPAN_TOKENS) for answer in answers) <= 1e-9
        for fraction in FRACTIONS:
            rate = metric(url, "wheels_realised_rate", aim=f"{fraction:g}")
            assert rate == pytest.approx(fraction, abs=0.02)
    assert len(list((tmp_path / "cache" / "prices").iterdir())) == 1
    again = gateway_service(untrained, stack.teacher, url, tmp_path, flags, "again")
    with running([again], timeout=300):
        async with openai_client(url) as client:
            answers = await replies(client, sources[:WARM_UP], 0.3)
    assert realised(answers) == pytest.approx(0.3, abs=0.02)
