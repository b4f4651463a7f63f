"""A teacher that does not work, and the messages about it."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from typing import get_args

import pytest
from aiohttp import web

from server.teacher.ask import STREAM_ABOVE
from server.teacher.client import Teacher
from server.teacher.errors import EXPLANATIONS, Reason, TeacherError
from server.teacher.patience import SPAN
from tests.helpers.fake_teacher import begin_events, body, choice, event, stream
from tests.helpers.teacher_calls import (
    EITHER,
    IMPATIENCE,
    LONG,
    PATIENCE,
    SHORT,
    VOCABULARY,
    client,
    collect,
    either,
    failure,
    hang_up,
    write,
)

pytestmark = pytest.mark.steady_time


@pytest.fixture
async def impatient(server) -> AsyncIterator[Teacher]:
    async with client(server.url, IMPATIENCE) as teacher:
        yield teacher


# A teacher that does not work


@EITHER
async def test_a_missing_teacher_is_unreachable(tokens):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    async with client(url) as teacher:
        error = await failure(write(teacher, tokens))
    assert error.reason == "unreachable"
    assert teacher.name in str(error)


@EITHER
@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
async def test_a_refusal_by_the_teacher_has_its_status(server, teacher, tokens, status):
    server.answers = [body({"error": {"message": "not today"}}, status)]
    error = await failure(write(teacher, tokens))
    assert error.reason == "status"
    assert str(status) in str(error)
    assert "not today" in str(error)


@EITHER
@pytest.mark.parametrize(
    "reply",
    [
        "",
        "{",
        "<html>",
        "[]",
        {},
        {"choices": []},
        {"choices": [{}, {}]},
        {"error": {"message": "out of memory", "code": 500}},
        choice([7], "tool_calls"),
        choice([7], "abort"),
        choice([7.5]),
        choice("seven"),
        choice([-1]),
        choice([VOCABULARY]),
        choice(list(range(LONG + 1))),
        choice([], "length"),
        choice(None, "length"),
    ],
    ids=lambda reply: str(reply)[:60],
)
async def test_an_unusable_reply_is_nonsense(server, teacher, tokens, reply):
    server.answers = [stream(reply) if tokens > STREAM_ABOVE else body(reply)]
    assert (await failure(write(teacher, tokens))).reason == "nonsense"


async def test_a_stream_with_too_many_tokens_is_nonsense(server, teacher):
    server.answers = [stream(choice([1] * 5, None), choice([2] * 5))]
    pieces = write(teacher, LONG)
    assert (await anext(pieces)).token_ids == [1] * 5
    assert (await failure(pieces)).reason == "nonsense"


async def test_the_last_visible_token_is_accepted(server, teacher):
    server.answers = [body(choice([0, VOCABULARY - 1]))]
    assert (await collect(write(teacher, SHORT)))[0].token_ids == [0, VOCABULARY - 1]


@EITHER
async def test_a_reply_without_an_ending_is_nonsense(server, teacher, tokens):
    server.answers = [either(tokens, choice([7], None))]
    pieces = write(teacher, tokens)
    assert (await anext(pieces)).token_ids == [7]  # written tokens stay valid
    error = await failure(pieces)
    assert error.reason == "nonsense"
    assert "without a finish reason" in str(error)


@EITHER
async def test_a_teacher_that_hangs_is_a_timeout(server, impatient, tokens):
    async def answer(request: web.Request) -> web.StreamResponse:
        await server.until_lost()
        return web.Response()

    server.answers = [answer]
    assert (await failure(write(impatient, tokens))).reason == "timeout"
    await asyncio.wait_for(server.lost.wait(), PATIENCE)  # and the call is ended at the teacher


async def test_a_teacher_that_hangs_amid_a_stream_is_a_timeout(server, impatient):
    async def answer(request: web.Request) -> web.StreamResponse:
        response = await begin_events(request)
        await response.write(event(choice([7], None)))
        await server.until_lost()
        return response

    server.answers = [answer]
    pieces = write(impatient, LONG)
    assert (await anext(pieces)).token_ids == [7]
    assert (await failure(pieces)).reason == "timeout"
    await asyncio.wait_for(server.lost.wait(), PATIENCE)


@EITHER
async def test_a_teacher_that_sends_bytes_but_no_tokens_is_a_timeout(server, impatient, tokens):
    async def answer(request: web.Request) -> web.StreamResponse:
        response = await begin_events(request)
        while True:
            await response.write(b" ")
            await asyncio.sleep(IMPATIENCE / 10)

    server.answers = [answer]
    assert (await failure(write(impatient, tokens))).reason == "timeout"


async def test_a_span_has_a_deadline_however_steadily_it_drips(server):
    """A token every 0.1 s would take 1 s for ten: the span has 0.45 s."""
    async with client(server.url, span_timeout=0.45) as teacher:
        server.answers = [stream(*[choice([i], None) for i in range(9)], choice([9]), pause=0.1)]
        assert (await failure(write(teacher, LONG + 1))).reason == "timeout"


async def test_the_deadline_counts_from_the_start_of_the_span(server, teacher):
    server.answers = [body(choice([7]))]
    error = await failure(write(teacher, SHORT, started=time.monotonic() - 60))
    assert error.reason == "timeout"


async def test_no_token_comes_after_the_deadline(server, teacher):
    async def answer(request: web.Request) -> web.StreamResponse:
        response = await begin_events(request)
        await response.write(event(choice([7], None)))
        await server.until_lost()
        return response

    server.answers = [answer]
    pieces = write(teacher, LONG, deadline=time.monotonic() + 1)
    assert (await anext(pieces)).token_ids == [7]
    assert (await failure(pieces)).reason == "timeout"


async def test_a_span_that_moves_on_may_be_as_long_as_it_is(server):
    """64 tokens come at once, so the next ones have as much time again."""
    async with client(server.url, span_timeout=0.5) as teacher:
        server.answers = [stream(choice([1] * SPAN, None), choice([2], None), choice([3]), pause=0.3)]
        assert len(await collect(write(teacher, SPAN + 2))) == 3


async def test_a_teacher_that_hangs_after_its_last_token_delays_no_client(server, teacher):
    async def answer(request: web.Request) -> web.StreamResponse:
        response = await begin_events(request)
        await response.write(event(choice([7])))
        await server.until_lost()
        return response

    server.answers = [answer]
    before = time.monotonic()
    assert [piece.token_ids for piece in await collect(write(teacher, LONG))] == [[7]]
    assert time.monotonic() - before < PATIENCE / 2
    assert not teacher.breaker.tripped


@EITHER
async def test_a_teacher_that_dies_amid_its_reply_is_an_error(server, teacher, tokens):
    async def answer(request: web.Request) -> web.StreamResponse:
        response = await begin_events(request)
        if tokens > STREAM_ABOVE:
            await response.write(event(choice([7], None)))
        await response.write(b'data: {"choi')
        request.transport.close()
        return response

    server.answers = [answer]
    assert (await failure(write(teacher, tokens))).reason == "unreachable"


# Secrets


@pytest.mark.parametrize("answer", [body({"error": {"message": "secret reply"}}, 500), hang_up])
async def test_a_password_in_the_url_is_sent_and_shown_to_nobody(server, answer, caplog):
    url = server.url.replace("://", "://user:p%40ss@")
    async with client(url) as teacher:
        server.answers = [answer]
        error = await failure(write(teacher, SHORT))
        assert server.requests[0].headers["Authorization"] == "Basic dXNlcjpwQHNz"
        shown = [teacher.name, teacher.url, str(error), error.explanation, caplog.text]
    assert not any("p%40ss" in text or "p@ss" in text or "user" in text for text in shown)
    assert not any(word in error.explanation for word in ("secret", "127.0.0.1", "http"))


def test_a_password_and_a_key_are_one_too_many():
    with pytest.raises(TeacherError, match="a password in its URL and an API key") as error:
        client("http://user:pass@host:8000", api_key="key")
    assert "pass@" not in str(error.value)


def test_every_reason_has_a_sentence_for_clients():
    assert set(EXPLANATIONS) == set(get_args(Reason))
    assert all(text.startswith(("The teacher", "No teacher")) for text in EXPLANATIONS.values())
