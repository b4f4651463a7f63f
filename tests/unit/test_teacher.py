import asyncio
import socket
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, get_args

import pytest
from aiohttp import web
from fake_teacher import Answer, Server, begin_events, body, choice, event, stream
from prometheus_client import REGISTRY

from server.completion import Piece
from server.teacher.breaker import Breaker
from server.teacher.client import KEEP_ALIVE, STREAM_ABOVE, Ask, Teacher
from server.teacher.errors import EXPLANATIONS, Reason, TeacherError
from server.teacher.patience import READING, SPAN, Patience
from server.vllm_api import Logprob, SamplingParams

pytestmark = pytest.mark.steady_time

SHORT, LONG = STREAM_ABOVE, STREAM_ABOVE + 1  # spans that come as one body, as a stream
EITHER = pytest.mark.parametrize("tokens", [SHORT, LONG], ids=["body", "stream"])
VOCABULARY = 100
PATIENCE, IMPATIENCE = 20.0, 0.2  # timeouts that must not, and must, pass
CALL = ("request_id", "started", "deadline")  # what is said of a call, not asked of the teacher


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with Server() as server:
        yield server


def client(url: str, timeout: float = PATIENCE, failures: int = 3, **settings: Any) -> Teacher:
    settings = {"model": "big", "breaker": Breaker(failures, 60.0), "vocabulary": VOCABULARY} | settings
    return Teacher(url, timeout=timeout, **settings)


@pytest.fixture
async def teacher(server) -> AsyncIterator[Teacher]:
    async with client(server.url) as teacher:
        yield teacher


@pytest.fixture
async def impatient(server) -> AsyncIterator[Teacher]:
    async with client(server.url, IMPATIENCE) as teacher:
        yield teacher


def either(tokens: int, *replies: object) -> Answer:
    """The replies as a stream, or the last one as a body, as the span's length asks for."""
    return stream(*replies) if tokens > STREAM_ABOVE else body(replies[-1])


def write(teacher: Teacher, tokens: int, **given: Any) -> AsyncIterator[Piece]:
    call = {"request_id": "r-1"} | {name: given.pop(name) for name in CALL if name in given}
    ask = {"prompt_ids": [1, 2, 3], "params": SamplingParams()} | given
    return teacher.write(Ask(tokens=tokens, **ask), **call)


async def collect(pieces: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in pieces]


async def failure(pieces: AsyncIterator[Piece]) -> TeacherError:
    with pytest.raises(TeacherError) as error:
        await collect(pieces)
    return error.value


def calls(teacher: Teacher, outcome: str) -> float:
    labels = {"replica": teacher.name, "outcome": outcome}
    return REGISTRY.get_sample_value("wheels_teacher_calls_total", labels) or 0.0


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
    """Or the span loop would go on for a client that has left."""
    reply = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(teacher._wait(reply, Patience(10.0, 20.0, prompt_tokens=1)))
    await asyncio.sleep(0)
    reply.set_result(b"too late")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_slow_teacher_is_waited_for_token_by_token(server):
    """Five pauses of 0.25 s are longer than the timeout, each alone is shorter."""
    async with client(server.url, timeout=1.0) as teacher:
        server.answers = [stream(*[choice([i], None) for i in range(5)], choice([5]), pause=0.25)]
        assert len(await collect(write(teacher, LONG))) == 6


# What the teacher is asked


async def test_token_ids_go_both_ways(server, teacher):
    server.answers = [body(choice([7]))]
    await collect(write(teacher, 5, seed=11))
    sent = server.bodies[0]
    assert (sent["prompt"], sent["max_tokens"], sent["seed"]) == ([1, 2, 3], 5, 11)
    assert (sent["model"], sent["return_token_ids"], sent["add_special_tokens"]) == ("big", True, False)
    assert "logprobs" not in sent


async def test_the_callers_sampling_is_the_teachers(server, teacher):
    server.answers = [body(choice([7]))]
    sampling = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
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


# Log-probabilities


def top(**alternatives: float) -> dict[str, float]:
    return {f"token_id:{name.removeprefix('t')}": value for name, value in alternatives.items()}


@EITHER
async def test_log_probabilities_come_by_token_id(server, teacher, tokens):
    logprobs = {"token_logprobs": [-0.5, -3.0], "top_logprobs": [top(t7=-0.5, t4=-1.5), top(t4=-0.1)]}
    server.answers = [either(tokens, choice([7, 8], logprobs=logprobs))]
    (piece,) = await collect(write(teacher, tokens, params=SamplingParams(logprobs=2)))
    assert piece.logprobs == [
        {7: Logprob(-0.5, rank=1), 4: Logprob(-1.5, rank=2)},
        {8: Logprob(-3.0), 4: Logprob(-0.1, rank=1)},  # 8 was not among the best
    ]
    assert [list(entry) for entry in piece.logprobs] == [[7, 4], [8, 4]]  # the written token first
    assert server.bodies[0]["logprobs"] == 2
    assert server.bodies[0]["return_tokens_as_token_ids"] is True


async def test_rows_that_the_student_does_not_have_are_left_out(server, teacher):
    """A teacher's vocabulary may be padded further: such an id has no text."""
    tops = {f"token_id:{VOCABULARY}": -0.2, f"token_id:{VOCABULARY + 9}": -0.3, "token_id:4": -1.5}
    server.answers = [body(choice([7], logprobs={"token_logprobs": [-0.5], "top_logprobs": [tops]}))]
    (piece,) = await collect(write(teacher, 5, params=SamplingParams(logprobs=3)))
    assert {i: (entry.logprob, entry.rank) for i, entry in piece.logprobs[0].items()} == {
        7: (-0.5, None),
        4: (-1.5, 1),
    }


async def test_alternatives_are_ranked_by_probability(server, teacher):
    logprobs = {"token_logprobs": [-2.0], "top_logprobs": [top(t7=-2.0, t4=-0.5, t5=-1.0)]}
    server.answers = [body(choice([7], logprobs=logprobs))]
    (piece,) = await collect(write(teacher, 1, params=SamplingParams(logprobs=3)))
    assert {token: entry.rank for token, entry in piece.logprobs[0].items()} == {7: 3, 4: 1, 5: 2}


async def test_no_alternatives_were_asked_for(server, teacher):
    server.answers = [body(choice([7], logprobs={"token_logprobs": [-0.5], "top_logprobs": None}))]
    (piece,) = await collect(write(teacher, 1, params=SamplingParams(logprobs=0)))
    assert piece.logprobs == [{7: Logprob(-0.5)}]


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        {"token_logprobs": []},
        {"token_logprobs": [-1.0, -1.0]},
        {"token_logprobs": [None]},
        {"token_logprobs": ["high"]},
        {"token_logprobs": [-1.0], "top_logprobs": [{"seven": -1.0}]},
        {"token_logprobs": [-1.0], "top_logprobs": [{}, {}]},
    ],
)
async def test_log_probabilities_that_do_not_fit_are_nonsense(server, teacher, logprobs):
    server.answers = [body(choice([7], logprobs=logprobs))]
    error = await failure(write(teacher, 1, params=SamplingParams(logprobs=1)))
    assert error.reason == "nonsense"


# A teacher that does not work


@EITHER
async def test_a_teacher_that_is_not_there(tokens):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    async with client(url) as teacher:
        error = await failure(write(teacher, tokens))
    assert error.reason == "unreachable"
    assert teacher.name in str(error)


@EITHER
@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
async def test_a_teacher_that_refuses(server, teacher, tokens, status):
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
async def test_a_teacher_that_talks_nonsense(server, teacher, tokens, reply):
    server.answers = [stream(reply) if tokens > STREAM_ABOVE else body(reply)]
    assert (await failure(write(teacher, tokens))).reason == "nonsense"


async def test_a_stream_that_writes_too_much_in_all(server, teacher):
    server.answers = [stream(choice([1] * 5, None), choice([2] * 5))]
    pieces = write(teacher, LONG)
    assert (await anext(pieces)).token_ids == [1] * 5
    assert (await failure(pieces)).reason == "nonsense"


async def test_the_last_visible_token_is_one(server, teacher):
    server.answers = [body(choice([0, VOCABULARY - 1]))]
    assert (await collect(write(teacher, SHORT)))[0].token_ids == [0, VOCABULARY - 1]


@EITHER
async def test_a_reply_without_an_ending(server, teacher, tokens):
    server.answers = [either(tokens, choice([7], None))]
    pieces = write(teacher, tokens)
    assert (await anext(pieces)).token_ids == [7]  # what was written stays valid
    error = await failure(pieces)
    assert error.reason == "nonsense"
    assert "without a finish reason" in str(error)


@EITHER
async def test_a_teacher_that_hangs(server, impatient, tokens):
    async def answer(request: web.Request) -> web.StreamResponse:
        await server.until_lost()
        return web.Response()

    server.answers = [answer]
    assert (await failure(write(impatient, tokens))).reason == "timeout"
    await asyncio.wait_for(server.lost.wait(), PATIENCE)  # and is not left with the call


async def test_a_teacher_that_hangs_amid_a_stream(server, impatient):
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
async def test_a_teacher_that_drips_bytes_but_no_tokens(server, impatient, tokens):
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


async def test_no_token_comes_behind_the_deadline(server, teacher):
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
    """64 tokens come at once, so there is as much time again for the next ones."""
    async with client(server.url, span_timeout=0.5) as teacher:
        server.answers = [stream(choice([1] * SPAN, None), choice([2], None), choice([3]), pause=0.3)]
        assert len(await collect(write(teacher, SPAN + 2))) == 3


async def test_a_teacher_that_hangs_behind_its_last_token_holds_nobody_up(server, teacher):
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
async def test_a_teacher_that_dies_amid_its_reply(server, teacher, tokens):
    async def answer(request: web.Request) -> web.StreamResponse:
        response = await begin_events(request)
        if tokens > STREAM_ABOVE:
            await response.write(event(choice([7], None)))
        await response.write(b'data: {"choi')
        request.transport.close()
        return response

    server.answers = [answer]
    assert (await failure(write(teacher, tokens))).reason == "unreachable"


# Connections


async def hang_up(request: web.Request) -> web.StreamResponse:
    request.transport.abort()
    return web.Response()


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


# What the breaker is told


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
async def test_what_a_client_can_bring_about_does_not_open_the_breaker(server, answer, reason, opens):
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
        labels = {"replica": teacher.name}
        assert REGISTRY.get_sample_value("wheels_breaker_open", labels) == 1
        await collect(write(teacher, SHORT))
        assert not teacher.breaker.open
        assert REGISTRY.get_sample_value("wheels_breaker_open", labels) == 0


@pytest.mark.parametrize(
    ("status", "opens"), [(400, False), (413, False), (422, False), (404, True), (503, True)]
)
async def test_a_request_that_is_wrong_does_not_speak_against_the_teacher(server, status, opens):
    """Or one client could take the teacher from all others."""
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
    """Durations that were observed; a port, and with it a label, may come again."""
    return REGISTRY.get_sample_value("wheels_teacher_call_seconds_count", {"replica": teacher.name}) or 0.0


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


async def test_what_is_not_a_model_list_is_nonsense(server, teacher):
    server.models = {"models": ["llama"]}
    with pytest.raises(TeacherError, match="/v1/models") as error:
        await teacher.connect()
    assert error.value.reason == "nonsense"


async def test_health_is_what_the_teacher_says(server, teacher):
    assert await teacher.healthy() is True
    server.health = 503
    assert await teacher.healthy() is False


async def test_a_teacher_that_does_not_answer_in_time_may_be_healthy_or_not(server):
    server.health_seconds = 0.3
    async with client(server.url, timeout=0.1) as teacher:
        assert await teacher.healthy() is None


async def test_a_teacher_that_is_gone_is_not_healthy(server):
    async with client(server.url) as teacher:
        await server._server.close()
        assert await teacher.healthy() is False


# Replies of any length


@EITHER
async def test_a_long_prompt_may_be_echoed(server, tokens):
    """vLLM puts the prompt's ids into the first line of a stream."""
    prompt = [10**6 + i for i in range(200_000)]
    replies = (choice([7], None, prompt_token_ids=prompt), choice([8]))
    async with client(server.url) as teacher:
        server.answers = [either(tokens, *replies[-1 if tokens == SHORT else 0 :])]
        pieces = await collect(write(teacher, tokens, prompt_ids=prompt))
    assert [piece.token_ids for piece in pieces] == ([[8]] if tokens == SHORT else [[7], [8]])
    assert server.bodies[0]["prompt"] == prompt


@EITHER
async def test_a_reply_without_end_is_nonsense(server, teacher, tokens, monkeypatch):
    monkeypatch.setattr("server.teacher.client.LONGEST", 2**16)

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await begin_events(request)
        while True:
            await response.write(b"x" * 2**14)

    server.answers = [answer]
    error = await failure(write(teacher, tokens))
    assert error.reason == "nonsense"
    assert "bytes" in str(error)


async def test_lines_may_end_in_any_way(server, teacher):
    async def answer(request: web.Request) -> web.StreamResponse:
        response = await begin_events(request)
        first, last = event(choice([7], None)).strip(), event(choice([8])).strip()
        await response.write(b": a comment\r\n\r\n" + first.replace(b"data: ", b"data:") + b"\r\n\r\n" + last)
        return response

    server.answers = [answer]
    assert [piece.token_ids for piece in await collect(write(teacher, LONG))] == [[7], [8]]


async def test_an_error_of_ours_is_the_calls(server, teacher, monkeypatch, caplog):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("never thought of")

    monkeypatch.setattr("server.teacher.client.read_reply", broken)
    server.answers = [body(choice([7]))]
    assert (await failure(write(teacher, SHORT))).reason == "nonsense"
    assert "never thought of" in caplog.text


@EITHER
@pytest.mark.parametrize(
    "headers",
    [{"Content-Type": "text/plain; charset=no"}, {"Content-Encoding": "gzip"}, {"Content-Encoding": "br"}],
    ids=["charset", "no gzip", "no brotli"],
)
@pytest.mark.parametrize("status", [200, 500])
async def test_whatever_is_wrong_with_a_reply_is_a_failed_call(server, teacher, tokens, headers, status):
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=b"data: \xff\xfe", status=status, headers=headers)

    server.answers = [answer]
    assert (await failure(write(teacher, tokens))).reason in ("unreachable", "status", "nonsense")


# Ids that the student does not have


@EITHER
async def test_an_id_that_the_student_does_not_have_is_dropped_and_the_rest_asked_for_again(
    server, teacher, tokens
):
    server.answers = [
        either(tokens, choice([7, 8, VOCABULARY + 3, 9], "length")),
        either(tokens, choice([9, VOCABULARY + 5], "stop", stop_reason=VOCABULARY + 5)),
        either(tokens, choice([10], "stop")),
    ]
    given = {"seed": 5, "min_tokens": 3, "params": SamplingParams(frequency_penalty=0.5, logit_bias={4: 1.0})}
    pieces = await collect(write(teacher, tokens, **given))
    assert [piece.token_ids for piece in pieces] == [[7, 8], [9], [10]]
    assert [piece.finish_reason for piece in pieces] == [None, None, "stop"]
    first, second, third = server.bodies
    assert [body["prompt"] for body in server.bodies] == [[1, 2, 3], [1, 2, 3, 7, 8], [1, 2, 3, 7, 8, 9]]
    assert [body["max_tokens"] for body in server.bodies] == [tokens, tokens - 2, tokens - 3]
    assert [body["min_tokens"] for body in server.bodies] == [3, 1, 0]
    assert len({body["seed"] for body in server.bodies}) == 3
    assert first["logit_bias"] == {"4": 1.0}
    assert second["logit_bias"] == {"4": 1.0, "7": -0.5, "8": -0.5, str(VOCABULARY + 3): -100.0}
    assert third["logit_bias"][str(VOCABULARY + 5)] == -100.0
    assert calls(teacher, "ok") >= 1


async def test_log_probabilities_end_with_the_tokens(server, teacher):
    tops = [top(t7=-0.5), {f"token_id:{VOCABULARY}": -0.1}]
    logprobs = {"token_logprobs": [-0.5, -0.1], "top_logprobs": tops}
    end = {"token_logprobs": [-0.2], "top_logprobs": [top(t8=-0.2)]}
    server.answers = [
        body(choice([7, VOCABULARY], logprobs=logprobs)),
        body(choice([8], "stop", logprobs=end)),
    ]
    pieces = await collect(write(teacher, SHORT, params=SamplingParams(logprobs=1)))
    assert [list(piece.logprobs) for piece in pieces] == [
        [{7: Logprob(-0.5, rank=1)}],
        [{8: Logprob(-0.2, rank=1)}],
    ]


async def test_a_teacher_that_writes_nothing_else_is_given_up_and_not_blamed(server):
    async with client(server.url, failures=1) as teacher:
        server.answers = [body(choice([VOCABULARY + 3]))]
        error = await failure(write(teacher, SHORT))
        assert (error.reason, error.well) == ("nonsense", True)
        assert not teacher.breaker.tripped


# Ends and caches


async def test_the_students_end_tokens_end_the_teachers_completion_too(server, teacher):
    server.answers = [body(choice([7, 98], "stop", stop_reason=98))]
    params = SamplingParams(stop_token_ids=[4])
    (piece,) = await collect(write(teacher, SHORT, params=params, end_ids=[98, 97]))
    assert server.bodies[0]["stop_token_ids"] == [4, 98, 97]
    assert (piece.finish_reason, piece.stop_reason) == ("stop", None), "as where the student ends"


async def test_ends_are_ignored_where_the_caller_says_so(server, teacher):
    server.answers = [body(choice([7]))]
    params = SamplingParams(stop_token_ids=[4], ignore_eos=True)
    await collect(write(teacher, SHORT, params=params, end_ids=[98]))
    assert server.bodies[0]["stop_token_ids"] == [4]


async def test_the_cache_is_salted_as_the_caller_says(server, teacher):
    server.answers = [body(choice([7]))]
    await collect(write(teacher, SHORT, cache_salt="pepper"))
    await collect(write(teacher, SHORT))
    assert [body.get("cache_salt") for body in server.bodies] == ["pepper", None]


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
    """It takes longer than the timeout for a token, and longer than that for a span."""
    async with client(server.url, 0.2, span_timeout=0.3) as teacher:

        async def answer(request: web.Request) -> web.StreamResponse:
            await asyncio.sleep(0.8)
            return await body(choice([7]))(request)

        server.answers = [answer]
        pieces = await collect(write(teacher, SHORT, prompt_ids=[1] * 20 * READING))
        assert [piece.token_ids for piece in pieces] == [[7]]


@EITHER
@pytest.mark.parametrize(("health", "blamed"), [(200, False), (503, True)])
async def test_who_waits_blames_a_teacher_only_if_it_is_not_well(server, tokens, health, blamed):
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


async def test_who_waits_while_others_are_served_meets_a_busy_teacher(server):
    """Nobody asks for its health then: it may be too busy to answer."""
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


# What is secret


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
