"""Teacher = student: however often they take turns, the completion is what one model alone writes."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from openai import AsyncOpenAI

from server.local.pair import Serving
from tests.helpers.client import chat, openai_client


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


async def test_a_frequency_penalty_counts_the_whole_completion(
    twin_client: AsyncOpenAI, sources: list[str]
) -> None:
    penalty = {"frequency_penalty": 0.8, "max_tokens": 120, "extra_body": {"ignore_eos": True}}
    for source in sources[:6]:
        alone = await chat(twin_client, source, 0, **penalty)
        for budget in (0.2, 0.6, 1):
            together = await chat(twin_client, source, budget, **penalty)
            assert together.choices[0].token_ids == alone.choices[0].token_ids
            assert budget == 1 or len(together.teacher["spans"]) > 3
    free = await chat(twin_client, source, 0, **penalty | {"frequency_penalty": 0})
    assert free.choices[0].token_ids != alone.choices[0].token_ids
