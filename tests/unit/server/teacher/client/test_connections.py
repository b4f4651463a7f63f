"""Connections to a teacher, from the start to the end."""

import asyncio

import pytest
from aiohttp import web

from server.teacher.connection import KEEP_ALIVE
from server.teacher.errors import TeacherError
from tests.helpers.fake_teacher import begin_events, body, choice, event, stream
from tests.helpers.teacher_calls import (
    EITHER,
    LONG,
    PATIENCE,
    SHORT,
    calls,
    client,
    collect,
    failure,
    hang_up,
    write,
)

pytestmark = pytest.mark.steady_time


# Connections


async def test_a_connection_is_used_again(server, teacher):
    server.answers = [body(choice([7])), stream(choice([7], None), choice([8])), body(choice([7]))]
    for tokens in (SHORT, LONG, SHORT):
        await collect(write(teacher, tokens))
    assert len(server.connections) == 1


async def test_a_refusal_leaves_the_connection_usable(server, teacher):
    server.answers = [body({"error": "busy"}, 503), body(choice([7]))]
    await failure(write(teacher, SHORT))
    await collect(write(teacher, SHORT))
    assert len(server.connections) == 1


async def test_a_kept_connection_that_was_closed_meanwhile_is_replaced(server, teacher):
    server.answers = [hang_up, body(choice([7]))]
    assert [piece.token_ids for piece in await collect(write(teacher, SHORT))] == [[7]]
    assert len(server.connections) == 2


async def test_all_kept_connections_may_have_been_closed_meanwhile(server, teacher):
    server.answers = [body(choice([7]))]
    await asyncio.gather(*(collect(write(teacher, SHORT)) for _ in range(3)))
    assert len(server.connections) == 3
    server.answers = [hang_up, hang_up, hang_up, body(choice([8]))]
    assert [piece.token_ids for piece in await collect(write(teacher, SHORT))] == [[8]]
    assert len(server.connections) == 4


async def test_a_teacher_that_keeps_hanging_up_is_unreachable(server, teacher):
    server.answers = [hang_up]
    assert (await failure(write(teacher, SHORT))).reason == "unreachable"
    assert len(server.requests) == 2


def test_idle_connections_are_dropped_before_vllm_does_it():
    assert KEEP_ALIVE < 5  # VLLM_HTTP_TIMEOUT_KEEP_ALIVE


async def test_leaving_the_iterator_closes_the_connection(server, teacher):
    async def answer(request: web.Request) -> web.StreamResponse:
        response = await begin_events(request)
        await response.write(event(choice([7], None)))
        await server.until_lost()
        return response

    server.answers, before = [answer], calls(teacher, "aborted")
    pieces = write(teacher, LONG)
    await anext(pieces)
    await pieces.aclose()
    await asyncio.wait_for(server.lost.wait(), PATIENCE)
    assert calls(teacher, "aborted") - before == 1
    assert teacher.breaker.allow()


@EITHER
async def test_cancelling_the_caller_closes_the_connection(server, teacher, tokens):
    called = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        called.set()
        await server.until_lost()
        return web.Response()

    server.answers, before = [answer], calls(teacher, "aborted")
    task = asyncio.create_task(collect(write(teacher, tokens)))
    await called.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(server.lost.wait(), PATIENCE)
    assert calls(teacher, "aborted") - before == 1


async def test_calls_at_once_do_not_wait_for_each_other(server, teacher):
    together = asyncio.Barrier(5)

    async def answer(request: web.Request) -> web.Response:
        await asyncio.wait_for(together.wait(), PATIENCE)
        return await body(choice([7]))(request)

    server.answers = [answer]
    await asyncio.gather(*(collect(write(teacher, SHORT)) for _ in range(5)))
    assert len(server.connections) == 5


# Getting to know the teacher


@pytest.mark.parametrize(("wanted", "served", "length"), [(None, "big", 512), ("other", "other", None)])
async def test_the_teachers_model_is_found(server, wanted, served, length):
    async with client(server.url, model=wanted) as teacher:
        await teacher.connect()
        assert (teacher.model, teacher.max_model_len) == (served, length)


@pytest.mark.parametrize(
    ("models", "wanted", "said"),
    [
        ({"data": [{"id": "big"}]}, "small", "serves big, not 'small'"),
        ({"data": []}, None, "serves no model"),
        ({"data": []}, "big", "serves no model, not 'big'"),
    ],
)
async def test_a_teacher_without_the_model_is_refused(server, models, wanted, said):
    server.models = models
    async with client(server.url, model=wanted) as teacher:
        with pytest.raises(TeacherError, match=said) as error:
            await teacher.connect()
    assert error.value.reason == "status"


async def test_an_unusable_list_of_models_is_reported_as_nonsense(server, teacher):
    server.models = {"models": ["llama"]}
    with pytest.raises(TeacherError, match="/v1/models") as error:
        await teacher.connect()
    assert error.value.reason == "nonsense"


async def test_the_teachers_health_check_decides(server, teacher):
    assert await teacher.healthy() is True
    server.health = 503
    assert await teacher.healthy() is False


async def test_a_teacher_that_does_not_answer_in_time_may_be_healthy_or_not(server):
    server.health_seconds = 0.3
    async with client(server.url, timeout=0.1) as teacher:
        assert await teacher.healthy() is None


async def test_a_teacher_that_answers_calls_meanwhile_is_healthy(server):
    """A busy teacher has a queue for its health check, too."""
    server.health_seconds = 60.0
    server.answers = [body(choice([7]))]
    async with client(server.url, 10.0) as teacher:
        check = asyncio.create_task(teacher.healthy())
        await asyncio.sleep(0.5)
        await collect(write(teacher, SHORT))
        assert await check is True
        assert await teacher.healthy() is None


async def test_a_teacher_that_is_gone_is_not_healthy(server):
    async with client(server.url) as teacher:
        await server._server.close()
        assert await teacher.healthy() is False
