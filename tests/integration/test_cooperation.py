"""The gateway as a client sees it: every surface, every budget, both models at work."""

import asyncio
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError
from transformers import AutoTokenizer

from measuring.pair import Pair, Serving
from tests.helpers.client import PATIENCE, chat, excess, metric, settled, source_of_tokens

FRACTIONS = (0.05, 0.1, 0.2, 0.5)


async def test_budget_zero_never_calls_the_teacher(
    client: AsyncOpenAI, stack: Serving, sources: list[str]
) -> None:
    calls = metric(stack.gateway, "wheels_teacher_calls_total")
    replies = await asyncio.gather(*(chat(client, source, 0) for source in sources[:32]))
    assert all(reply.teacher["tokens"] == reply.teacher["calls"] == 0 for reply in replies)
    assert metric(stack.gateway, "wheels_teacher_calls_total") == calls


async def test_at_budget_one_the_teacher_writes_alone(
    client: AsyncOpenAI, teacher_client: AsyncOpenAI, sources: list[str]
) -> None:
    for source in sources[:8]:
        ours = await chat(client, source, 1)
        theirs = await chat(teacher_client, source, model="teacher")
        assert ours.choices[0].token_ids == theirs.choices[0].token_ids
        assert ours.choices[0].message.content == theirs.choices[0].message.content
        assert ours.choices[0].finish_reason == theirs.choices[0].finish_reason == "stop"
        assert ours.teacher["rate"] == 1.0
        assert ours.teacher["calls"] == 1
        cached = {"prompt_tokens_details"}  # only this teacher reports cached tokens
        assert ours.usage.model_dump(exclude=cached) == theirs.usage.model_dump(exclude=cached)


async def test_bound_holds_in_every_prefix_of_hundreds_of_concurrent_requests(
    client: AsyncOpenAI, sources: list[str], span_tokens: int
) -> None:
    asked = [(source, fraction) for source in sources[:100] for fraction in FRACTIONS]
    replies = await asyncio.gather(*(chat(client, source, fraction) for source, fraction in asked))
    assert max(excess(reply, f, span_tokens) for reply, (_, f) in zip(replies, asked, strict=True)) <= 1e-9
    assert not any(reply.teacher["denied"] or reply.teacher["degraded"] for reply in replies)
    assert all(reply.usage.completion_tokens == len(reply.choices[0].token_ids) for reply in replies)
    by_fraction = {
        f: [r.teacher["rate"] for r, (_, g) in zip(replies, asked, strict=True) if f == g] for f in FRACTIONS
    }
    means = [sum(rates) / len(rates) for rates in by_fraction.values()]
    assert means == sorted(means)
    assert means[0] > 0


@pytest.mark.parametrize("budget", [{"tokens": 3}, {"calls": 1}, {"tokens": 5, "calls": 2, "fraction": 0.5}])
async def test_budgets_of_tokens_and_calls_are_never_exceeded(
    client: AsyncOpenAI, sources: list[str], budget: dict[str, Any], span_tokens: int
) -> None:
    replies = await asyncio.gather(*(chat(client, source, budget) for source in sources[:64]))
    assert max(reply.teacher["tokens"] for reply in replies) <= budget.get("tokens", 10**9)
    assert max(reply.teacher["calls"] for reply in replies) <= budget.get("calls", 10**9)
    assert max(excess(reply, budget.get("fraction", 1), span_tokens) for reply in replies) <= 1e-9
    assert sum(reply.teacher["tokens"] for reply in replies) > 0


@pytest.mark.parametrize(
    "budget", [-0.1, 1.5, "0.1", True, [], {}, {"tokens": -1}, {"tokens": 1.5}, {"share": 0.1}]
)
async def test_bad_budget_is_refused_by_name(client: AsyncOpenAI, budget: Any) -> None:
    with pytest.raises(BadRequestError) as error:
        await chat(client, "x", budget)
    assert error.value.body["param"] == "teacher_budget"
    assert "teacher_budget" in error.value.body["message"]


@pytest.mark.parametrize("prompt", [[[]], [999_999]], ids=["empty", "unknown id"])
async def test_a_prompt_that_vllm_refuses_never_reaches_the_teacher(
    client: AsyncOpenAI, stack: Serving, prompt: list[Any]
) -> None:
    calls = metric(stack.gateway, "wheels_teacher_calls_total")
    for budget in (0, 0.5, 1):
        with pytest.raises(BadRequestError):
            await client.completions.create(
                model="wheels", prompt=prompt, max_tokens=8, extra_body={"teacher_budget": budget}
            )
    assert metric(stack.gateway, "wheels_teacher_calls_total") == calls


async def test_a_stream_names_the_writer_of_every_token(client: AsyncOpenAI, sources: list[str]) -> None:
    whole = await chat(client, sources[1], 0.5)
    stream = await chat(client, sources[1], 0.5, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    ids, written_by = [], []
    for chunk in chunks:
        if chunk.choices and (new := getattr(chunk.choices[0], "token_ids", None)):
            ids += new
            written_by += [chunk.source == "teacher"] * len(new)
    assert text == whole.choices[0].message.content
    assert ids == whole.choices[0].token_ids
    assert written_by == source_of_tokens(whole)
    assert chunks[-1].teacher == whole.teacher
    assert whole.teacher["tokens"] > 0
    assert chunks[-1].usage == whole.usage
    assert {chunk.source for chunk in chunks} == {"student", "teacher"}


async def test_completions_take_token_ids_and_echo_the_prompt(
    client: AsyncOpenAI, pair: Pair, sources: list[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair.student)
    message = [{"role": "user", "content": sources[2]}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    via_chat = await chat(client, sources[2], 0.2)
    body = {"teacher_budget": 0.2, "return_token_ids": True}
    reply = await client.completions.create(
        model="wheels", prompt=prompt, temperature=0, max_tokens=96, echo=True, extra_body=body
    )
    assert reply.choices[0].token_ids == via_chat.choices[0].token_ids
    assert reply.choices[0].text.endswith(via_chat.choices[0].message.content)
    assert reply.teacher == via_chat.teacher


async def test_a_stop_string_may_cross_the_border_of_a_span(
    client: AsyncOpenAI, pair: Pair, sources: list[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair.student)
    tested = 0
    for source in sources[:40]:
        reply = await chat(client, source, 0.3)
        ids, text = reply.choices[0].token_ids, reply.choices[0].message.content
        borders = [start for start, end in reply.teacher["spans"] if start > 0 and end < len(ids)]
        if not borders:
            continue
        border = borders[0]
        before, after = tokenizer.decode(ids[:border]), tokenizer.decode(ids[border:])
        stop = before[-1:] + after[:1]  # the student's last character and the teacher's first
        expected = text[: text.index(stop)]
        for stream in (False, True):
            stopped = await chat(client, source, 0.3, stop=[stop], stream=stream)
            if stream:
                chunks = [chunk async for chunk in stopped]
                got = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                finish = chunks[-1].choices[0]
            else:
                got, finish = stopped.choices[0].message.content, stopped.choices[0]
            assert got == expected
            assert finish.finish_reason == "stop"
            assert finish.stop_reason == stop
        tested += 1
        if tested == 3:
            return
    pytest.fail(f"only {tested} completions had a teacher's span inside")


async def test_several_choices_have_their_own_reports(
    client: AsyncOpenAI, sources: list[str], span_tokens: int
) -> None:
    reply = await chat(client, sources[3], 0.3, n=4, temperature=1.0, seed=11)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert sum(choice.teacher["tokens"] for choice in reply.choices) == reply.teacher["tokens"]
    assert sum(len(choice.token_ids) for choice in reply.choices) == reply.usage.completion_tokens
    for choice in range(4):
        assert sum(source_of_tokens(reply, choice)) == reply.choices[choice].teacher["tokens"]
    assert len({tuple(choice.token_ids) for choice in reply.choices}) > 1
    stream = await chat(client, sources[3], 0.3, n=4, temperature=1.0, seed=11, stream=True)
    texts, reports = [""] * 4, [None] * 4
    async for chunk in stream:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reports[choice.index] = getattr(chunk, "teacher", None)
    assert texts == [choice.message.content for choice in reply.choices]
    assert reports == [choice.teacher for choice in reply.choices]


async def test_a_seed_repeats_the_completion(client: AsyncOpenAI, sources: list[str]) -> None:
    first, second, other = [
        await chat(client, sources[4], 0.3, temperature=1.5, seed=seed) for seed in (5, 5, 6)
    ]
    assert first.choices[0].token_ids == second.choices[0].token_ids
    assert first.teacher == second.teacher
    assert first.choices[0].token_ids != other.choices[0].token_ids


async def test_log_probabilities_are_those_of_the_writer_of_each_token(
    client: AsyncOpenAI, teacher_client: AsyncOpenAI, pair: Pair, sources: list[str]
) -> None:
    reply = await chat(client, sources[5], 0.5, logprobs=True, top_logprobs=3)
    choice = reply.choices[0]
    assert len(choice.logprobs.content) == len(choice.token_ids)
    by_teacher = source_of_tokens(reply)
    assert any(by_teacher)
    assert not all(by_teacher)
    tokenizer = AutoTokenizer.from_pretrained(pair.student)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": sources[5]}], add_generation_prompt=True, return_dict=False
    )
    for position, entry in enumerate(choice.logprobs.content):
        # Greedy: each model wrote its best token. Masked rows have no share of the probability.
        assert entry.logprob == pytest.approx(max(top.logprob for top in entry.top_logprobs))
        assert len(entry.top_logprobs) == 3
        if by_teacher[position]:
            alone = await teacher_client.completions.create(
                model="teacher",
                prompt=prompt + choice.token_ids[:position],
                max_tokens=1,
                temperature=0,
                logprobs=1,
            )
            assert entry.logprob == pytest.approx(alone.choices[0].logprobs.token_logprobs[0], abs=1e-4)


async def test_responses_and_messages_count_tokens_correctly(stack: Serving, sources: list[str]) -> None:
    async with httpx.AsyncClient(base_url=stack.gateway, timeout=PATIENCE) as http:
        body = {
            "model": "wheels",
            "input": sources[6],
            "temperature": 0,
            "max_output_tokens": 16,
            "teacher_budget": 0.5,
        }
        reply = (await http.post("/v1/responses", json=body)).json()
        assert reply["usage"]["output_tokens"] <= 16
        assert 0 < reply["teacher"]["tokens"] <= reply["usage"]["output_tokens"]
        message = [{"role": "user", "content": sources[6]}]
        body = {
            "model": "wheels",
            "messages": message,
            "temperature": 0,
            "max_tokens": 16,
            "teacher_budget": 0.5,
        }
        anthropic = (await http.post("/v1/messages", json=body)).json()
        assert anthropic["usage"]["output_tokens"] == reply["usage"]["output_tokens"]
        assert anthropic["teacher"] == reply["teacher"]
        assert anthropic["content"][0]["text"] == reply["output"][0]["content"][0]["text"]


async def test_min_tokens_holds_with_a_teacher(client: AsyncOpenAI, sources: list[str]) -> None:
    free = await chat(client, sources[7], 0.2)
    least = len(free.choices[0].token_ids) + 8
    reply = await chat(client, sources[7], 0.2, extra_body={"min_tokens": least, "return_token_ids": True})
    assert len(reply.choices[0].token_ids) >= least
    assert reply.choices[0].token_ids[: len(free.choices[0].token_ids) - 1] == free.choices[0].token_ids[:-1]


@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids"])
async def test_reserved_rows_are_not_for_clients(client: AsyncOpenAI, field: str) -> None:
    with pytest.raises(BadRequestError, match="reserved"):
        await chat(client, "x", 0.1, extra_body={field: [480]})


async def test_a_client_cannot_set_the_price(client: AsyncOpenAI) -> None:
    with pytest.raises(BadRequestError, match="router"):
        await chat(client, "x", 0, extra_body={"vllm_xargs": {"wheels_price": -100.0}})


async def test_metrics_agree_with_those_of_the_teacher(
    client: AsyncOpenAI, stack: Serving, sources: list[str]
) -> None:
    async def counts() -> tuple[float, float, float]:
        ok = metric(stack.gateway, "wheels_teacher_calls_total", outcome="ok")
        tokens = metric(stack.gateway, "wheels_completion_tokens_total", source="teacher")
        return ok, tokens, metric(stack.teacher, "vllm:request_success_total")

    ok, tokens, served = await counts()
    replies = await asyncio.gather(*(chat(client, source, 0.1) for source in sources[:100]))
    calls = sum(reply.teacher["calls"] for reply in replies)
    assert calls > 0
    assert await settled(stack.teacher, "vllm:request_success_total", served + calls) == served + calls
    ok_after, tokens_after, _ = await counts()
    assert ok_after - ok == calls
    assert tokens_after - tokens == sum(reply.teacher["tokens"] for reply in replies)


async def test_a_client_that_leaves_stops_both_models(stack: Serving, sources: list[str]) -> None:
    running = "vllm:num_requests_running"
    requests = "wheels_requests_total"
    ended, aborted = metric(stack.gateway, requests), metric(stack.gateway, requests, outcome="aborted")
    body = {
        "model": "wheels",
        "messages": [{"role": "user", "content": sources[8]}],
        "max_tokens": 400,
        "ignore_eos": True,
        "stream": True,
    }

    async def leave(http: httpx.AsyncClient, budget: float) -> None:
        async with http.stream(
            "POST", "/v1/chat/completions", json=body | {"teacher_budget": budget}
        ) as reply:
            async for line in reply.aiter_lines():
                if '"source":"' in line:
                    return

    async with httpx.AsyncClient(base_url=stack.gateway, timeout=PATIENCE) as http:
        # At 1 the teacher is in the middle of one long span, at 0.4 the two take turns.
        await asyncio.gather(*(leave(http, budget) for budget in (1, 0.4) * 6))
        # On a busy machine a few completions end before this client reads their first event.
        assert await settled(stack.gateway, requests, ended + 12, seconds=30) == ended + 12
        assert metric(stack.gateway, requests, outcome="aborted") - aborted >= 6
        assert await settled(stack.gateway, running, 0) == 0
        assert await settled(stack.teacher, running, 0) == 0
        assert (await http.get("/ready")).json() == {
            "student": True,
            "teacher": True,
            "teacher_vocabulary": "same",
        }
