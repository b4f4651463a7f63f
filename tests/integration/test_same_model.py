"""Teacher = student: however often they take turns, the completion is what one model alone writes."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from client import chat, openai_client
from openai import AsyncOpenAI

from server.pair import Pair, Serving, serving


@pytest.fixture(scope="module")
def twins(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    twin = Pair(teacher=pair.student, student=pair.student, router=pair.router)
    with serving(twin, tmp_path_factory.mktemp("twins"), flags=("--gate", "random")) as stack:
        yield stack


@pytest.fixture
async def twin_client(twins: Serving) -> AsyncIterator[AsyncOpenAI]:
    async with openai_client(twins.gateway) as client:
        yield client


async def test_token_for_token_at_every_budget(twin_client: AsyncOpenAI, sources: list[str]) -> None:
    alone = await asyncio.gather(*(chat(twin_client, source, 0) for source in sources[:100]))
    spans = 0
    for budget in (0.1, 0.5, 0.9, 1, {"calls": 2}, {"tokens": 5}):
        together = await asyncio.gather(*(chat(twin_client, source, budget) for source in sources[:100]))
        for one, two in zip(alone, together, strict=True):
            assert two.choices[0].token_ids == one.choices[0].token_ids
            assert two.choices[0].message.content == one.choices[0].message.content
            assert two.choices[0].finish_reason == one.choices[0].finish_reason
            assert two.usage.completion_tokens == one.usage.completion_tokens
            spans += len(two.teacher["spans"])
    assert spans > 600
