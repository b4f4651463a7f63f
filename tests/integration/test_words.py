"""A router that wants budgets in words: its student reads them, and nobody else does."""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from measuring.pair import Pair, Serving
from router.checkpoint import RouterCheckpoint
from tests.helpers.client import chat, excess, openai_client
from tests.helpers.gateways import StartGateway

WORDS = "At most {percent} %: "
BUDGET = 0.2
LONG = {"ignore_eos": True}


@pytest.fixture(scope="module")
def asking(pair: Pair) -> RouterCheckpoint:
    """The shipped router, changed to want budgets in words."""
    shipped = RouterCheckpoint.load(pair.router)
    return replace(shipped, config=shipped.config.model_copy(update={"budget_prompt": WORDS}))


@pytest.fixture(scope="module")
def silent(asking: RouterCheckpoint) -> RouterCheckpoint:
    """A router that never asks, so that the student writes everything."""
    gate = {**asking.gate, "mlp.4.bias": asking.gate["mlp.4.bias"] - 1e6}
    return replace(asking, taps=asking.taps * 0, gate=gate)


@pytest.fixture(scope="module")
def router(silent: RouterCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A link to the silent router."""
    directory = tmp_path_factory.mktemp("words")
    silent.save(directory / "silent")
    (directory / "router").symlink_to(directory / "silent")
    return directory / "router"


@pytest.fixture(scope="module")
def served(gateway: StartGateway, router: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with gateway(tmp_path_factory.mktemp("logs"), "--router", str(router)) as serving:
        yield serving


@pytest.fixture
async def words_client(served: Serving) -> AsyncIterator[AsyncOpenAI]:
    async with openai_client(served.gateway) as client:
        yield client


def written(reply: Any) -> list[int]:
    ids: list[int] = reply.choices[0].token_ids
    return ids


@pytest.mark.parametrize("budget", [BUDGET, 0.22, {"fraction": BUDGET, "tokens": 1000}])
async def test_the_student_reads_its_budget_in_the_message_of_the_user(
    words_client: AsyncOpenAI, sources: list[str], budget: Any
) -> None:
    words = "At most 20 %: "
    said = await asyncio.gather(*(chat(words_client, words + source, 0) for source in sources[:12]))
    read = await asyncio.gather(*(chat(words_client, source, budget) for source in sources[:12]))
    plain = await asyncio.gather(*(chat(words_client, source, 0) for source in sources[:12]))
    assert list(map(written, read)) == list(map(written, said))
    assert list(map(written, read)) != list(map(written, plain))
    assert not any(reply.teacher["tokens"] for reply in read)


async def test_the_prompt_that_the_caller_sees_has_no_words(
    words_client: AsyncOpenAI, sources: list[str]
) -> None:
    read, plain = await asyncio.gather(*(chat(words_client, sources[0], budget) for budget in (BUDGET, 0)))
    assert read.prompt_token_ids == plain.prompt_token_ids
    assert read.usage.prompt_tokens == plain.usage.prompt_tokens


async def test_a_text_begins_with_the_words(words_client: AsyncOpenAI, sources: list[str]) -> None:
    async def complete(prompt: str, budget: float) -> str:
        reply = await words_client.completions.create(
            model="wheels", prompt=prompt, max_tokens=16, temperature=0, extra_body={"teacher_budget": budget}
        )
        return str(reply.choices[0].text)

    text = f"<|user|>{sources[0]}<|assistant|>"
    assert await complete(text, BUDGET) == await complete(f"At most 20 %: {text}", 0)


async def test_a_full_context_leaves_room_for_the_words(
    words_client: AsyncOpenAI, sources: list[str]
) -> None:
    """Without `max_tokens` a completion may fill the context, and the words take a part of it."""
    reply = await chat(words_client, sources[0], BUDGET, max_tokens=None, extra_body=LONG)
    words = await chat(words_client, f"At most 20 %: {sources[0]}", 0, max_tokens=None, extra_body=LONG)
    assert reply.usage.completion_tokens == words.usage.completion_tokens
    assert reply.choices[0].finish_reason == "length"


async def test_a_router_that_asks_keeps_its_bounds_and_the_teacher_reads_no_words(
    words_client: AsyncOpenAI,
    teacher_client: AsyncOpenAI,
    asking: RouterCheckpoint,
    router: Path,
    sources: list[str],
    span_tokens: int,
) -> None:
    asking.save(router.parent / "asking")
    (router.parent / "link").symlink_to(router.parent / "asking")
    os.replace(router.parent / "link", router)
    for _ in range(240):
        if (await chat(words_client, sources[0], BUDGET)).teacher["calls"]:
            break
        await asyncio.sleep(0.25)
    replies = await asyncio.gather(*(chat(words_client, source, BUDGET) for source in sources[:64]))
    assert max(excess(reply, BUDGET, span_tokens) for reply in replies) <= 1e-9
    assert sum(reply.teacher["tokens"] for reply in replies) > 64
    whole = await chat(words_client, sources[0], 1)
    theirs = await chat(teacher_client, sources[0], model="teacher")
    assert written(whole) == written(theirs)
