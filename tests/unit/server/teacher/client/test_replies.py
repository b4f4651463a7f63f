"""The parts of a teacher's reply that are read."""

import math

import pytest
from aiohttp import web

from server.vllm_api import Logprob, SamplingParams
from tests.helpers.fake_teacher import begin_events, body, choice, event, stream
from tests.helpers.teacher_calls import (
    EITHER,
    LONG,
    SHORT,
    VOCABULARY,
    calls,
    client,
    collect,
    either,
    failure,
    write,
)

pytestmark = pytest.mark.steady_time


# Log-probabilities


def top(**alternatives: float) -> dict[str, float]:
    return {f"token_id:{name.removeprefix('t')}": value for name, value in alternatives.items()}


@EITHER
async def test_the_teacher_is_asked_for_the_named_tokens(server, teacher, tokens):
    """The tokens come in the order in which they were named. A row without a token has no probability."""
    named = [9, 7, 4, VOCABULARY]
    first = top(t7=-0.5, t9=-4.0, t4=-1.5) | {f"token_id:{VOCABULARY}": -0.1}
    second = top(t8=-3.0, t9=-0.25, t7=-2.0, t4=-0.1) | {f"token_id:{VOCABULARY}": -0.1}
    logprobs = {"token_logprobs": [-0.5, -3.0], "top_logprobs": [first, second]}
    server.answers = [either(tokens, choice([7, 8], logprobs=logprobs))]
    (piece,) = await collect(write(teacher, tokens, params=SamplingParams(logprob_token_ids=named)))
    values = [[(i, entry.logprob) for i, entry in position.items()] for position in piece.logprobs]
    assert values == [
        [(7, -0.5), (9, -4.0), (4, -1.5), (VOCABULARY, -math.inf)],  # the written token first
        [(8, -3.0), (9, -0.25), (7, -2.0), (4, -0.1), (VOCABULARY, -math.inf)],
    ]
    assert (server.bodies[0]["logprobs"], server.bodies[0]["logprob_token_ids"]) == (4, named)


async def test_a_reply_that_leaves_out_a_named_token_is_refused(server, teacher):
    """An older server does not know the parameter, and sends the best tokens."""
    logprobs = {"token_logprobs": [-0.5], "top_logprobs": [top(t7=-0.5)]}
    server.answers = [body(choice([7], logprobs=logprobs))]
    error = await failure(write(teacher, 1, params=SamplingParams(logprob_token_ids=[9])))
    assert (error.reason, str(error)) == ("nonsense", "the teacher's log-probabilities lack the token 9")


async def test_all_log_probabilities_come_as_a_stream_however_short_the_span(server, teacher):
    """One body of eight tokens with 100,000 log-probabilities each would exceed the size limit of replies."""
    tops = {f"token_id:{i}": -float(i) for i in range(VOCABULARY + 32)}
    logprobs = {"token_logprobs": [-7.0], "top_logprobs": [tops]}
    server.answers = [stream(choice([7], logprobs=logprobs))]
    (piece,) = await collect(write(teacher, SHORT, params=SamplingParams(logprobs=-1)))
    assert sorted(piece.logprobs[0]) == list(range(VOCABULARY))
    assert (server.bodies[0]["logprobs"], server.bodies[0]["stream"]) == (-1, True)


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


async def test_without_a_request_for_alternatives_there_are_none(server, teacher):
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


async def test_an_error_of_our_own_ends_the_call(server, teacher, monkeypatch, caplog):
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
    given = {"seed": 5, "min_tokens": 3, "params": SamplingParams(logit_bias={4: 1.0})}
    pieces = await collect(write(teacher, tokens, **given))
    assert [piece.token_ids for piece in pieces] == [[7, 8], [9], [10]]
    assert [piece.finish_reason for piece in pieces] == [None, None, "stop"]
    first, second, third = server.bodies
    assert [body["prompt"] for body in server.bodies] == [[1, 2, 3], [1, 2, 3, 7, 8], [1, 2, 3, 7, 8, 9]]
    assert [body["max_tokens"] for body in server.bodies] == [tokens, tokens - 2, tokens - 3]
    assert [body["min_tokens"] for body in server.bodies] == [3, 1, 0]
    assert len({body["seed"] for body in server.bodies}) == 3
    assert first["logit_bias"] == {"4": 1.0}
    assert second["logit_bias"] == {"4": 1.0, str(VOCABULARY + 3): -100.0}
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


async def test_a_teacher_that_writes_only_unknown_ids_is_given_up_and_not_blamed(server):
    async with client(server.url, failures=1) as teacher:
        server.answers = [body(choice([VOCABULARY + 3]))]
        error = await failure(write(teacher, SHORT))
        assert (error.reason, error.well) == ("nonsense", True)
        assert not teacher.breaker.tripped
