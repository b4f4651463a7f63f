"""Rows of the table in docs/api.md that are not tested elsewhere, each over two models, through HTTP."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError
from transformers import AutoTokenizer

from measuring.pair import Pair, Serving
from tests.helpers.client import PATIENCE, chat, metric

COUNTED = ("wheels_requests_total", "wheels_completion_tokens_total")
STUDENT_ALONE = {"use_beam_search": True}


@pytest.mark.parametrize("parameter", STUDENT_ALONE)
async def test_parameters_that_two_models_cannot_honour_need_the_student_alone(
    client: AsyncOpenAI, sources: list[str], parameter: str
) -> None:
    extra = {parameter: STUDENT_ALONE[parameter]}
    with pytest.raises(BadRequestError, match=f"{parameter} cannot be used") as error:
        await chat(client, sources[0], 0.1, extra_body=extra)
    assert error.value.body["param"] == parameter
    alone = await chat(client, sources[0], None, max_tokens=8, extra_body=extra)
    assert alone.teacher["calls"] == 0


@pytest.mark.parametrize("budget", [0.3, 1])
async def test_max_tokens_and_ignore_eos_hold_for_both_models(
    client: AsyncOpenAI, sources: list[str], budget: float
) -> None:
    reply = await chat(client, sources[1], budget, max_tokens=150, extra_body={"ignore_eos": True})
    assert len(reply.choices[0].token_ids) == reply.usage.completion_tokens == 150
    assert reply.choices[0].finish_reason == "length"
    assert reply.teacher["tokens"] > 0


@pytest.mark.parametrize("budget", [0.3, 1])
async def test_both_models_apply_a_bias_and_a_choice_of_tokens(
    client: AsyncOpenAI, sources: list[str], budget: float
) -> None:
    biased = await chat(client, sources[1], budget, max_tokens=40, logit_bias={"70": 100})
    assert set(biased.choices[0].token_ids) == {70}
    pool = [70, 71, 72, 73]
    chosen = await chat(client, sources[1], budget, max_tokens=40, extra_body={"allowed_token_ids": pool})
    assert len(chosen.choices[0].token_ids) == 40
    assert set(chosen.choices[0].token_ids) <= set(pool)


@pytest.mark.parametrize("budget", [0, 0.3, 1])
async def test_stop_tokens_and_shown_stop_strings_end_a_completion(
    client: AsyncOpenAI, sources: list[str], budget: float
) -> None:
    whole = await chat(client, sources[2], budget)
    ids, text = whole.choices[0].token_ids, whole.choices[0].message.content
    stopped = await chat(client, sources[2], budget, extra_body={"stop_token_ids": [ids[9]]})
    assert stopped.choices[0].token_ids == ids[: ids.index(ids[9]) + 1]
    assert (stopped.choices[0].finish_reason, stopped.choices[0].stop_reason) == ("stop", ids[9])
    stop = text[12:15]
    shown = await chat(
        client, sources[2], budget, stop=[stop], extra_body={"include_stop_str_in_output": True}
    )
    assert shown.choices[0].message.content == text[: text.index(stop) + len(stop)]


@pytest.mark.parametrize("budget", [0.3, 1])
async def test_special_tokens_are_shown_when_asked_for(
    client: AsyncOpenAI, pair: Pair, sources: list[str], budget: float
) -> None:
    hidden = await chat(client, sources[3], budget)
    shown = await chat(client, sources[3], budget, extra_body={"skip_special_tokens": False})
    end = AutoTokenizer.from_pretrained(pair.student).eos_token
    assert shown.choices[0].message.content in (
        hidden.choices[0].message.content,  # vLLM leaves the end of a completion out
        hidden.choices[0].message.content + end,
    )
    assert shown.choices[0].token_ids == hidden.choices[0].token_ids


async def test_usage_can_be_in_every_chunk(client: AsyncOpenAI, sources: list[str]) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = await chat(client, sources[3], 0.3, stream=True, stream_options=options)
    chunks = [chunk async for chunk in stream]
    written = 0
    for chunk in chunks:
        if chunk.choices:
            written += len(getattr(chunk.choices[0], "token_ids", None) or ())
            assert chunk.usage.completion_tokens == written
    assert chunks[-1].usage.completion_tokens == written > 0


async def test_a_penalty_on_repetition_counts_the_tokens_of_both_models(
    client: AsyncOpenAI, sources: list[str]
) -> None:
    extra = {"repetition_penalty": 1.8, "ignore_eos": True}
    for budget in (0.3, 1):
        free = await chat(client, sources[1], budget, max_tokens=60, extra_body={"ignore_eos": True})
        varied = await chat(client, sources[1], budget, max_tokens=60, extra_body=extra)
        assert len(set(varied.choices[0].token_ids)) > len(set(free.choices[0].token_ids))


@pytest.mark.parametrize(
    "fields", [{"prompt": [480]}, {"prompt": "x", "logit_bias": {"480": 1}}, {"prompt": "x", "n": 0}]
)
async def test_reserved_rows_and_wrong_values_are_refused(stack: Serving, fields: dict[str, Any]) -> None:
    async with httpx.AsyncClient(base_url=stack.gateway, timeout=PATIENCE) as http:
        for budget in (0, 0.3):
            body = {"model": "wheels", "max_tokens": 4, "teacher_budget": budget} | fields
            assert (await http.post("/v1/completions", json=body)).status_code == 400


async def test_request_ids_are_those_of_the_client(stack: Serving, sources: list[str]) -> None:
    """The same id may come twice at once: it is the client's id, not ours."""
    async with httpx.AsyncClient(base_url=stack.gateway, timeout=PATIENCE) as http:
        message = {"model": "wheels", "messages": [{"role": "user", "content": sources[0]}]}
        replies = await asyncio.gather(
            *(
                http.post(
                    "/v1/chat/completions",
                    json=message | {"teacher_budget": 0.3, "temperature": 0},
                    headers={"X-Request-Id": "order-7"},
                )
                for _ in range(4)
            )
        )
    assert {reply.status_code for reply in replies} == {200}
    assert {reply.headers["x-request-id"] for reply in replies} == {"order-7"}
    assert {reply.json()["id"] for reply in replies} == {"chatcmpl-order-7"}
    assert len({reply.json()["choices"][0]["message"]["content"] for reply in replies}) == 1


@pytest.mark.parametrize("budget", [None, 0, 0.5, 1])
async def test_the_prompts_log_probabilities_alone(
    stack: Serving, sources: list[str], budget: float | None
) -> None:
    """Evaluations of log-likelihoods send such requests."""
    body = {"model": "wheels", "prompt": sources[0], "max_tokens": 0, "echo": True, "logprobs": 1}
    extra = {} if budget is None else {"teacher_budget": budget}
    async with httpx.AsyncClient(base_url=stack.gateway, timeout=PATIENCE) as http:
        reply = (await http.post("/v1/completions", json=body | extra)).raise_for_status().json()
    assert reply["choices"][0]["text"] == sources[0]
    assert len(reply["choices"][0]["logprobs"]["tokens"]) == reply["usage"]["prompt_tokens"]
    assert reply["teacher"]["calls"] == 0


@pytest.mark.parametrize("budget", [0.5, 1])
async def test_the_prompts_log_probabilities_are_the_students(
    client: AsyncOpenAI, sources: list[str], budget: float
) -> None:
    """They are the same as for the student alone, whoever writes and however often the models take turns."""
    asked = {"max_tokens": 60, "extra_body": {"prompt_logprobs": 2}}
    alone = await chat(client, sources[1], 0, **asked)
    together = await chat(client, sources[1], budget, **asked)
    assert len(together.prompt_logprobs) == together.usage.prompt_tokens
    assert [list(entry or ()) for entry in together.prompt_logprobs] == [
        list(entry or ()) for entry in alone.prompt_logprobs
    ]
    for ours, theirs in zip(together.prompt_logprobs[1:], alone.prompt_logprobs[1:], strict=True):
        for token, entry in ours.items():
            assert entry["logprob"] == pytest.approx(theirs[token]["logprob"], abs=1e-4)
            assert (entry["rank"], entry["decoded_token"]) == (
                theirs[token]["rank"],
                theirs[token]["decoded_token"],
            )
    free = await chat(client, sources[1], budget, max_tokens=60)
    assert together.choices[0].token_ids == free.choices[0].token_ids
    assert together.teacher["tokens"] == free.teacher["tokens"] > 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("budget", [0.5, 1])
async def test_an_echo_has_the_log_probabilities_of_prompt_and_completion(
    stack: Serving, sources: list[str], budget: float, stream: bool
) -> None:
    body = {"model": "wheels", "prompt": sources[2], "max_tokens": 24, "n": 2, "seed": 1}
    body |= {"echo": True, "logprobs": 1, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=stack.gateway, timeout=PATIENCE) as http:

        async def scores(**more: Any) -> dict[int, list[float]]:
            reply = (await http.post("/v1/completions", json=body | more)).raise_for_status()
            replies = [reply.json()] if not more.get("stream") else events(reply.text)
            found: dict[int, list[float]] = {0: [], 1: []}
            for choice in (choice for each in replies for choice in each.get("choices", ())):
                found[choice["index"]] += (choice["logprobs"] or {}).get("token_logprobs", [])
            return found

        alone = await scores(max_tokens=0, n=1, teacher_budget=0)
        whole = await scores(teacher_budget=budget, stream=stream)
    prompt = len(alone[0])
    for choice in whole.values():
        assert choice[:prompt] == pytest.approx(alone[0], abs=1e-4)
        assert len(choice) == prompt + 24


def events(stream: str) -> list[Any]:
    """The events of a stream."""
    lines = (line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: {"))
    return [json.loads(line) for line in lines]


async def test_named_tokens_have_the_log_probabilities_of_whoever_wrote(
    client: AsyncOpenAI, sources: list[str]
) -> None:
    """Every token has them. As decoding is greedy, the written token is at least as probable as the named."""
    named = [70, 71, 72]
    extra = {"logprob_token_ids": named, "return_tokens_as_token_ids": True}
    reply = await chat(client, sources[5], 0.5, logprobs=True, extra_body=extra)
    assert 0 < reply.teacher["tokens"] < reply.usage.completion_tokens
    entries = reply.choices[0].logprobs.content
    assert len(entries) == reply.usage.completion_tokens
    for entry, written in zip(entries, reply.choices[0].token_ids, strict=True):
        ids = [int(top.token.removeprefix("token_id:")) for top in entry.top_logprobs]
        assert ids == list(dict.fromkeys([written, *named]))
        assert entry.logprob >= max(top.logprob for top in entry.top_logprobs) - 1e-5


BATCH = {"model": "wheels", "max_tokens": 48, "extra_body": {"teacher_budget": 0.5}}


@pytest.mark.parametrize("stream", [False, True])
async def test_every_prompt_of_a_batch_is_answered_as_if_it_were_alone(
    client: AsyncOpenAI, sources: list[str], stream: bool
) -> None:
    alone = []
    for source in sources[:3]:
        alone.append(await client.completions.create(prompt=source, temperature=0, **BATCH))
    reply = await client.completions.create(prompt=sources[:3], temperature=0, stream=stream, **BATCH)
    batch = await merged(reply) if stream else [(c.text, c.teacher) for c in reply.choices]
    assert batch == [(one.choices[0].text, one.teacher) for one in alone]
    assert sum(report["tokens"] for _, report in batch) > 0


@pytest.mark.parametrize("stream", [False, True])
async def test_every_choice_of_a_batch_has_a_report(
    client: AsyncOpenAI, sources: list[str], stream: bool
) -> None:
    reply = await client.completions.create(prompt=sources[:3], n=2, seed=7, stream=stream, **BATCH)
    batch = await merged(reply) if stream else [(c.text, c.teacher) for c in reply.choices]
    assert len(batch) == 6
    for _, report in batch:
        assert all(0 <= start < end <= 48 for start, end in report["spans"])
        assert sum(end - start for start, end in report["spans"]) == report["tokens"]
    if not stream:
        assert reply.teacher["tokens"] == sum(report["tokens"] for _, report in batch)


async def merged(stream: Any) -> list[tuple[str, Any]]:
    """(text, report) of every choice of a stream, in order."""
    texts: dict[int, str] = {}
    reports: dict[int, Any] = {}
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason is not None:
                reports[choice.index] = chunk.teacher
    return [(texts[index], reports[index]) for index in sorted(texts)]


async def test_a_beam_search_counts_what_the_client_gets(stack: Serving, sources: list[str]) -> None:
    body = {"model": "wheels", "prompt": sources[0], "max_tokens": 6, "n": 3, "use_beam_search": True}
    before = [metric(stack.gateway, name) for name in COUNTED]
    async with httpx.AsyncClient(base_url=stack.gateway, timeout=PATIENCE) as http:
        reply = (await http.post("/v1/completions", json=body)).raise_for_status().json()
    choices, tokens = [metric(stack.gateway, name) - n for name, n in zip(COUNTED, before, strict=True)]
    assert (choices, tokens) == (3, reply["usage"]["completion_tokens"])
    assert [choice["teacher"]["tokens"] for choice in reply["choices"]] == [0, 0, 0]
