"""Requests to a teacher, and the forms in which its reply comes."""

import asyncio

import pytest
from aiohttp import web

from server.teacher.patience import Patience
from server.vllm_api import SamplingParams
from tests.helpers.fake_teacher import begin_events, body, choice, event, stream
from tests.helpers.teacher_calls import EITHER, LONG, SHORT, client, collect, either, write

pytestmark = pytest.mark.steady_time


# A teacher that works


async def test_a_short_span_comes_as_one_piece(server, teacher):
    server.answers = [body(choice([7, 8, 9]))]
    (piece,) = await collect(write(teacher, SHORT))
    assert (piece.token_ids, piece.finish_reason, piece.logprobs) == ([7, 8, 9], "length", None)
    assert server.bodies[0]["stream"] is False


async def test_a_long_span_comes_as_it_is_written(server, teacher):
    written = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await begin_events(request)
        await response.write(event(choice([7], None)))
        await written.wait()  # the second token waits until the first one was read
        await response.write(event(choice([8, 9], None)) + event(choice([10])) + event("[DONE]"))
        return response

    server.answers = [answer]
    pieces = []
    async for piece in write(teacher, LONG):
        pieces.append((piece.token_ids, piece.finish_reason))
        written.set()
    assert pieces == [([7], None), ([8, 9], None), ([10], "length")]
    assert server.bodies[0]["stream"] is True


async def test_a_reply_may_arrive_in_any_packets(server, teacher):
    async def answer(request: web.Request) -> web.StreamResponse:
        response = await begin_events(request)
        for byte in event(choice([7], None)) + event(choice([8])):
            await response.write(bytes([byte]))
        return response

    server.answers = [answer]
    assert [piece.token_ids for piece in await collect(write(teacher, LONG))] == [[7], [8]]


@EITHER
async def test_the_teacher_may_end_the_completion(server, teacher, tokens):
    server.answers = [either(tokens, choice([99], "stop", stop_reason=99))]
    (piece,) = await collect(write(teacher, tokens))
    assert (piece.token_ids, piece.finish_reason, piece.stop_reason) == ([99], "stop", 99)


@EITHER
async def test_the_teacher_may_end_the_completion_without_a_token(server, teacher, tokens):
    server.answers = [either(tokens, choice([], "stop"))]
    (piece,) = await collect(write(teacher, tokens))
    assert (piece.token_ids, piece.finish_reason) == ([], "stop")


async def test_a_cancellation_that_comes_together_with_the_reply_is_not_lost(teacher):
    """If it were lost, the span loop would go on for a client that has left."""
    reply = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(teacher._connection._wait(reply, Patience(10.0, 20.0, prompt_tokens=1)))
    await asyncio.sleep(0)
    reply.set_result(b"too late")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_slow_teacher_is_waited_for_token_by_token(server):
    """Five pauses of 0.25 s together are longer than the timeout. Each alone is shorter."""
    async with client(server.url, timeout=1.0) as teacher:
        server.answers = [stream(*[choice([i], None) for i in range(5)], choice([5]), pause=0.25)]
        assert len(await collect(write(teacher, LONG))) == 6


# Requests to the teacher


async def test_token_ids_go_both_ways(server, teacher):
    server.answers = [body(choice([7]))]
    await collect(write(teacher, 5, seed=11))
    sent = server.bodies[0]
    assert (sent["prompt"], sent["max_tokens"], sent["seed"]) == ([1, 2, 3], 5, 11)
    assert (sent["model"], sent["return_token_ids"], sent["add_special_tokens"]) == ("big", True, False)
    assert "logprobs" not in sent


async def test_the_teacher_gets_the_callers_sampling_parameters(server, teacher):
    server.answers = [body(choice([7]))]
    sampling = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.4,
        "stop_token_ids": [4],
        "allowed_token_ids": [4, 7],
        "ignore_eos": True,
    }
    params = SamplingParams(**sampling, logit_bias={7: 2.0}, stop=["never sent"], n=3, max_tokens=99)
    await collect(write(teacher, 5, params=params))
    sent = server.bodies[0]
    assert {name: sent[name] for name in sampling} == sampling
    assert sent["logit_bias"] == {"7": 2.0}
    assert not {"stop", "n"} & sent.keys()
    assert sent["max_tokens"] == 5


@pytest.mark.parametrize(("owed", "sent"), [(0, 0), (3, 3), (9, 5)])
async def test_min_tokens_are_owed_within_the_span(server, teacher, owed, sent):
    server.answers = [body(choice([7]))]
    await collect(write(teacher, 5, min_tokens=owed))
    assert server.bodies[0]["min_tokens"] == sent


async def test_the_request_id_and_the_key_are_headers(server):
    server.answers = [body(choice([7]))]
    async with client(server.url, api_key="secret") as teacher:
        await collect(write(teacher, 5, request_id="r-17"))
    assert server.requests[0].headers["X-Request-Id"] == "r-17"
    assert server.requests[0].headers["Authorization"] == "Bearer secret"


async def test_without_a_key_there_is_no_header(server, teacher):
    server.answers = [body(choice([7]))]
    await collect(write(teacher, 5))
    assert "Authorization" not in server.requests[0].headers


# Ends and caches


async def test_the_students_end_tokens_end_the_teachers_completion_too(server, teacher):
    server.answers = [body(choice([7, 98], "stop", stop_reason=98))]
    params = SamplingParams(stop_token_ids=[4])
    (piece,) = await collect(write(teacher, SHORT, params=params, end_ids=[98, 97]))
    assert server.bodies[0]["stop_token_ids"] == [4, 98, 97]
    assert (piece.finish_reason, piece.stop_reason) == ("stop", None), "as where the student ends"


async def test_ends_are_ignored_if_the_caller_asks_for_it(server, teacher):
    server.answers = [body(choice([7]))]
    params = SamplingParams(stop_token_ids=[4], ignore_eos=True)
    await collect(write(teacher, SHORT, params=params, end_ids=[98]))
    assert server.bodies[0]["stop_token_ids"] == [4]


async def test_the_cache_has_the_callers_salt(server, teacher):
    server.answers = [body(choice([7]))]
    await collect(write(teacher, SHORT, cache_salt="pepper"))
    await collect(write(teacher, SHORT))
    assert [body.get("cache_salt") for body in server.bodies] == ["pepper", None]
