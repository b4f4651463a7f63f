"""Failures that a teacher is blamed for, and times when it is only slow."""

import asyncio
from functools import partial

import pytest
from aiohttp import web
from prometheus_client import REGISTRY

from server.teacher.client import Teacher
from server.teacher.patience import READING
from tests.helpers.fake_teacher import Server, body, choice, stream
from tests.helpers.teacher_calls import (
    EITHER,
    IMPATIENCE,
    LONG,
    PATIENCE,
    SHORT,
    VOCABULARY,
    calls,
    client,
    collect,
    failure,
    write,
)

pytestmark = pytest.mark.steady_time


# Reports to the breaker


@pytest.mark.parametrize(
    ("answer", "reason", "opens"),
    [
        (body(choice([VOCABULARY])), "nonsense", False),
        (body(choice([-1])), "nonsense", True),
        (body({"error": {"message": "logprobs", "code": 400}}), "status", False),
        (body({"error": {"message": "out of memory", "code": 500}}), "nonsense", True),
    ],
    ids=["a padded row", "no row", "a refusal in a stream", "a failure in a stream"],
)
async def test_faults_that_a_client_can_cause_do_not_open_the_breaker(server, answer, reason, opens):
    async with client(server.url, failures=1) as teacher:
        server.answers = [answer]
        assert (await failure(write(teacher, SHORT))).reason == reason
        assert teacher.breaker.open is opens


async def test_failed_calls_open_the_breaker_and_a_good_one_closes_it(server):
    async with client(server.url, failures=2) as teacher:
        server.answers = [body("oops", 500), body("{"), body(choice([7]))]
        await failure(write(teacher, SHORT))
        assert not teacher.breaker.open
        await failure(write(teacher, SHORT))
        assert teacher.breaker.open
        labels = {"teacher": "", "replica": teacher.name}
        assert REGISTRY.get_sample_value("wheels_breaker_open", labels) == 1
        await collect(write(teacher, SHORT))
        assert not teacher.breaker.open
        assert REGISTRY.get_sample_value("wheels_breaker_open", labels) == 0


@pytest.mark.parametrize(
    ("status", "opens"), [(400, False), (413, False), (422, False), (404, True), (503, True)]
)
async def test_a_wrong_request_is_not_held_against_the_teacher(server, status, opens):
    """Otherwise one client could take the teacher away from all others."""
    async with client(server.url, failures=1) as teacher:
        server.answers = [body({"error": {"message": "no"}}, status)]
        assert (await failure(write(teacher, SHORT))).refused is not opens
        assert teacher.breaker.open is opens


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [(body(choice([7])), "ok"), (body("oops", 500), "status"), (body("{"), "nonsense")],
)
async def test_a_call_is_counted_once_by_its_outcome(server, teacher, answer, outcome):
    server.answers = [answer]
    outcomes = ("ok", "aborted", "unreachable", "timeout", "status", "nonsense")
    before = {name: calls(teacher, name) for name in outcomes}
    timed = seconds_counted(teacher)
    pieces = write(teacher, SHORT)
    await (collect(pieces) if outcome == "ok" else failure(pieces))
    assert {name: calls(teacher, name) - before[name] for name in outcomes} == {
        name: float(name == outcome) for name in outcomes
    }
    assert seconds_counted(teacher) - timed == 1


def seconds_counted(teacher: Teacher) -> float:
    """Number of observed durations; a port, and so a label, may come again."""
    labels = {"teacher": "", "replica": teacher.name}
    return REGISTRY.get_sample_value("wheels_teacher_call_seconds_count", labels) or 0.0


# A teacher that takes its time


async def never(server: Server, _: web.Request) -> web.StreamResponse:
    await server.until_lost()
    return web.Response()


async def test_the_first_wait_grows_with_the_prompt(server):
    async with client(server.url, 1.0, span_timeout=2.0) as teacher:
        assert round(teacher.first_wait(0)) == 1
        assert round(teacher.first_wait(READING)) == 2
        assert round(teacher.first_wait(9 * READING)) == 10


async def test_a_long_prompt_is_waited_for(server):
    """The wait is longer than the timeout for a token, and longer than the timeout for a span."""
    async with client(server.url, 0.2, span_timeout=0.3) as teacher:

        async def answer(request: web.Request) -> web.StreamResponse:
            await asyncio.sleep(0.8)
            return await body(choice([7]))(request)

        server.answers = [answer]
        pieces = await collect(write(teacher, SHORT, prompt_ids=[1] * 20 * READING))
        assert [piece.token_ids for piece in pieces] == [[7]]


@EITHER
@pytest.mark.parametrize(("health", "blamed"), [(200, False), (503, True)])
async def test_a_long_wait_is_blamed_on_the_teacher_only_if_it_is_unhealthy(server, tokens, health, blamed):
    async with client(server.url, IMPATIENCE, failures=1) as teacher:
        server.answers, server.health = [partial(never, server)], health
        error = await failure(write(teacher, tokens))
        assert (error.reason, error.well) == ("timeout", not blamed)
        assert teacher.breaker.open is blamed


async def test_a_teacher_that_stands_still_is_blamed(server):
    async with client(server.url, IMPATIENCE, failures=1) as teacher:
        server.answers, server.health_seconds = [partial(never, server)], PATIENCE
        assert (await failure(write(teacher, SHORT))).reason == "timeout"
        assert teacher.breaker.open


async def test_a_wait_while_other_calls_are_served_means_a_busy_teacher(server):
    """The client does not check its health then: the teacher may be too busy to answer."""
    async with client(server.url, 0.4, span_timeout=PATIENCE, failures=1) as teacher:
        server.health = 503
        drip = stream(*[choice([7], None) for _ in range(8)], choice([8]), pause=0.1)
        server.answers = [drip, partial(never, server)]
        served = write(teacher, LONG)
        first = await anext(served)
        others = asyncio.create_task(collect(served))
        error = await failure(write(teacher, LONG))
        assert (error.reason, error.well) == ("saturated", True)
        assert [first.token_ids, len(await others)] == [[7], 8]
        assert not teacher.breaker.tripped
