"""Teacher = student: however often they take turns, the completion is what one model alone writes."""

import asyncio
from collections.abc import AsyncIterator
from typing import NamedTuple

import httpx
import pytest
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

from measuring.pair import Pair, Serving
from tests.helpers.client import chat, openai_client


class Requests(NamedTuple):
    """Numbers of requests that the teacher's server has answered, by endpoint."""

    generate: float
    completions: float

    @classmethod
    def of(cls, url: str) -> "Requests":
        found = dict.fromkeys(cls._fields, 0.0)
        for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
            for sample in family.samples:
                endpoint = sample.labels.get("handler", "").rpartition("/")[2]
                if sample.name == "http_requests_total" and endpoint in found:
                    found[endpoint] += sample.value
        return cls(**found)


@pytest.fixture
async def twin_client(twins: Serving) -> AsyncIterator[AsyncOpenAI]:
    async with openai_client(twins.gateway) as client:
        yield client


async def test_the_completion_is_the_same_token_for_token_at_every_budget(
    twin_client: AsyncOpenAI, sources: list[str]
) -> None:
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


async def test_the_teacher_is_asked_by_token_ids_alone(
    twins: Serving, twin_client: AsyncOpenAI, sources: list[str]
) -> None:
    """Other calls need the text of tokens, for example for log-probabilities."""
    before = Requests.of(twins.teacher)
    for extra in ({}, {"logprobs": True}):
        reply = await chat(twin_client, sources[0], 1, max_tokens=4, **extra)  # the gate is random below 1
        assert reply.teacher["calls"] == 1
    now = Requests.of(twins.teacher)
    assert (now.generate - before.generate, now.completions - before.completions) == (1, 1)


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


async def test_bad_words_do_not_cross_a_border(
    twin_client: AsyncOpenAI, pair: Pair, sources: list[str]
) -> None:
    """The bad words have two or three tokens that the model would write, across many borders."""
    tokenizer = AutoTokenizer.from_pretrained(pair.student)
    changed = 0
    for source in sources[:5]:
        free = await chat(twin_client, source, 0, max_tokens=60, extra_body={"ignore_eos": True})
        ids = free.choices[0].token_ids
        words = []
        for place in range(2, 50):
            word = ids[place : place + 2 + place % 2]
            text = tokenizer.decode(word)
            if text.strip() and tokenizer.encode(text.lstrip(), add_special_tokens=False) == word:
                words.append(text)
        extra = {"ignore_eos": True, "bad_words": words[:40]}
        alone = await chat(twin_client, source, 0, max_tokens=60, extra_body=extra)
        changed += alone.choices[0].token_ids != ids
        for budget in (0.2, 0.6, 1):
            together = await chat(twin_client, source, budget, max_tokens=60, extra_body=extra)
            assert together.choices[0].token_ids == alone.choices[0].token_ids
    assert changed


async def test_a_repetition_is_seen_across_borders(twin_client: AsyncOpenAI, sources: list[str]) -> None:
    """With this bias the model repeats itself, and ends where stock vLLM ends."""
    detection = {"max_pattern_size": 4, "min_pattern_size": 1, "min_count": 4}
    extra = {"ignore_eos": True, "repetition_detection": detection}
    ended = 0
    for source in sources[:5]:
        asked = {"max_tokens": 80, "extra_body": extra, "presence_penalty": -2.0}
        alone = (await chat(twin_client, source, 0, **asked)).choices[0]
        ended += alone.finish_reason == "repetition"
        for budget in (0.2, 0.6, 1):
            together = (await chat(twin_client, source, budget, **asked)).choices[0]
            assert together.token_ids == alone.token_ids
            assert (together.finish_reason, together.stop_reason) == (alone.finish_reason, alone.stop_reason)
    assert ended
