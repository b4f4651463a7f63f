"""Costs of completions on real engines: every surface reports them, and budgets in money hold."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from measuring.pair import Serving
from tests.helpers.client import PATIENCE, PRICES, chat, metric

MILLIONTH = 1e-6


def cost_of(report: dict[str, Any], prompt_tokens: int) -> float:
    """The cost by hand: every call reads the prompt and the tokens written before its span."""
    cost = 0
    for start, end in report["spans"]:
        reading = PRICES["teacher"]["input"] * (prompt_tokens + start)
        cost += reading + PRICES["teacher"]["output"] * (end - start)
    return cost * MILLIONTH


def last_report(stream: str) -> dict[str, Any]:
    """The last `teacher` among a stream's events."""
    reports = []
    for line in stream.splitlines():
        event = json.loads(line[6:]) if line.startswith("data: {") else {}
        if "teacher" in event:
            reports.append(event["teacher"])
    return reports[-1]


SURFACES = {
    "/v1/chat/completions": lambda s: {"messages": [{"role": "user", "content": s}], "max_tokens": 40},
    "/v1/completions": lambda s: {"prompt": s, "max_tokens": 20},
    "/v1/responses": lambda s: {"input": s, "max_output_tokens": 40},
    "/v1/messages": lambda s: {"messages": [{"role": "user", "content": s}], "max_tokens": 40},
}


def prompt_tokens(usage: dict[str, Any]) -> int:
    return usage.get("prompt_tokens", usage.get("input_tokens", 0))


@pytest.mark.parametrize("path", SURFACES)
async def test_every_surface_reports_what_the_teacher_cost(
    stack: Serving, sources: list[str], path: str
) -> None:
    body = SURFACES[path](sources[6]) | {"model": "wheels", "temperature": 0, "teacher_budget": 0.5}
    session = {"id": f"run{path.replace('/', '.')}", "tokens": 1000, "cost": 1}
    async with httpx.AsyncClient(base_url=stack.gateway, timeout=PATIENCE) as http:
        reply = (await http.post(path, json=body | {"teacher_session": session})).json()
        streamed = (await http.post(path, json=body | {"teacher_session": session, "stream": True})).text
    report = reply["teacher"]
    assert report["calls"] > 0
    assert report["cost"] == pytest.approx(cost_of(report, prompt_tokens(reply["usage"])))
    assert report["saved"] < 0.01
    assert report["session"] == session | {
        "tokens_spent": report["tokens"],
        "cost_spent": pytest.approx(report["cost"], abs=1e-8),
    }
    again = last_report(streamed)
    assert again["cost"] == report["cost"]
    assert again["session"]["tokens_spent"] == report["tokens"] + again["tokens"]
    assert again["session"]["cost_spent"] == pytest.approx(2 * report["cost"], abs=1e-8)


async def test_a_cost_is_never_exceeded(client: AsyncOpenAI, sources: list[str]) -> None:
    budgets = [{"cost": n * 50 * MILLIONTH, "fraction": 0.9} for n in range(1, 41)]
    replies = await asyncio.gather(
        *(chat(client, source, budget) for source, budget in zip(sources, budgets, strict=False))
    )
    for reply, budget in zip(replies, budgets, strict=True):
        assert reply.teacher["cost"] == pytest.approx(cost_of(reply.teacher, reply.usage.prompt_tokens))
        assert reply.teacher["cost"] <= budget["cost"]
    assert sum(reply.teacher["calls"] for reply in replies) > 10


async def test_concurrent_requests_share_the_budget_of_a_session(
    client: AsyncOpenAI, sources: list[str]
) -> None:
    session = {"id": "at-once", "cost": 0.002}
    extra = {"return_token_ids": True, "teacher_session": session}
    replies = await asyncio.gather(*(chat(client, source, 0.5, extra_body=extra) for source in sources[:40]))
    cost = sum(reply.teacher["cost"] for reply in replies)
    assert 0.001 < cost <= 0.002
    assert any("session_cost" in reply.teacher["denied"] for reply in replies)
    last = await chat(client, sources[0], 0.5, extra_body={"teacher_session": "at-once"})
    spent = last.teacher["session"]["cost_spent"]
    assert spent == pytest.approx(cost + last.teacher["cost"], abs=1e-6)
    with pytest.raises(openai.BadRequestError, match="already has a different budget") as error:
        await chat(client, sources[0], extra_body={"teacher_session": session | {"cost": 0.003}})
    assert error.value.param == "teacher_session"


async def test_the_teacher_finds_a_prefix_that_it_reads_again_in_its_cache(
    client: AsyncOpenAI, stack: Serving, sources: list[str]
) -> None:
    """The teacher reports cached tokens: it has --enable-prompt-tokens-details. A block has 32 tokens."""
    labels = {"model": "teacher", "kind": "cached_input"}
    before = metric(stack.gateway, "wheels_cost_total", **labels)
    alone = metric(stack.gateway, "wheels_teacher_alone_cost_total")
    prompt = " ".join(sources[20:24])
    for _ in range(2):
        reply = await chat(client, prompt, 1, max_tokens=12)
    read = metric(stack.gateway, "wheels_cost_total", **labels) - before
    blocks = (reply.usage.prompt_tokens - 1) // 32
    assert blocks > 0
    assert read >= blocks * 32 * 2 * MILLIONTH - 1e-9
    assert metric(stack.gateway, "wheels_teacher_alone_cost_total") > alone
    assert reply.teacher["saved"] == pytest.approx(0, abs=1e-9), "the teacher wrote all of it"
