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


COUNTING = {
    "frequency": {"frequency_penalty": 0.8},
    "presence": {"presence_penalty": 1.5},
    "a reward": {"presence_penalty": -0.4, "frequency_penalty": 0.3},
    "presence, no end yet": {"presence_penalty": 1.5, "extra_body": {"min_tokens": 60}},
}


@pytest.mark.parametrize("name", COUNTING)
async def test_penalties_count_the_whole_completion(
    twin_client: AsyncOpenAI, sources: list[str], name: str
) -> None:
    asked = {"max_tokens": 90} | COUNTING[name]
    asked["extra_body"] = {"ignore_eos": True} | asked.get("extra_body", {})
    free = {**asked, "frequency_penalty": 0, "presence_penalty": 0}
    changed = 0
    for source in sources[:5]:
        alone = await chat(twin_client, source, 0, **asked)
        changed += (
            alone.choices[0].token_ids != (await chat(twin_client, source, 0, **free)).choices[0].token_ids
        )
        for budget in (0.2, 0.6, 1):
            together = await chat(twin_client, source, budget, **asked)
            assert together.choices[0].token_ids == alone.choices[0].token_ids
            assert budget == 1 or len(together.teacher["spans"]) > 3
    assert changed


async def test_bad_words_do_not_cross_a_border(twin_client: AsyncOpenAI, sources: list[str]) -> None:
    """Three tokens in a row that the models would write: they come to lie across many borders."""
    for source in sources[:5]:
        free = await chat(twin_client, source, 0, max_tokens=60, extra_body={"ignore_eos": True})
        text = free.choices[0].message.content
        words = [text[place : place + 3] for place in range(4, 40, 6) if text[place : place + 3].strip()]
        extra = {"ignore_eos": True, "bad_words": words}
        alone = await chat(twin_client, source, 0, max_tokens=60, extra_body=extra)
        assert alone.choices[0].token_ids != free.choices[0].token_ids
        for budget in (0.2, 0.6, 1):
            together = await chat(twin_client, source, budget, max_tokens=60, extra_body=extra)
            assert together.choices[0].token_ids == alone.choices[0].token_ids
