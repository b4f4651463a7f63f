"""A stock teacher under a grammar of the gateway: its requests, and the place where its tokens are cut."""

import asyncio
from typing import Any

import pytest
from aiohttp import web

from server.grammar.constraint import Constraint, Grammars
from server.teacher import constrained
from server.teacher.ask import STREAM_ABOVE
from server.teacher.patience import END_SECONDS
from server.vllm_api import Logprob, SamplingParams
from tests.helpers.fake_teacher import begin_events, body, choice, event, stream
from tests.helpers.grammars import PROMPT_IDS, checked, engine_config, ids
from tests.helpers.teacher_calls import PATIENCE, client, collect, write

END = 1
DIGITS = [ids(digit)[0] for digit in "0123456789"]


@pytest.fixture(scope="module")
def config() -> Any:
    return engine_config()


@pytest.fixture(scope="module")
def grammars(config: Any) -> Grammars:
    return Grammars(config)


async def constraint_of(config: Any, grammars: Grammars, written: str = "", **grammar: Any) -> Constraint:
    constraint = grammars.constrain("r-0", PROMPT_IDS, checked(config, **grammar), {})
    assert await constraint.catch_up(ids(written))
    return constraint


@pytest.fixture
async def teacher(server):
    async with client(server.url, vocabulary=480) as teacher:
        yield teacher


async def test_a_span_goes_on_after_a_token_that_the_grammar_refuses(config, grammars, server, teacher):
    constraint = await constraint_of(config, grammars, "1", regex="[0-9]{3} (red|blue)")
    server.answers = [
        body(choice([*ids("2x"), *ids("zz")])),
        body(choice(ids("3"))),
        body(choice([*ids(" red"), END], "stop")),
    ]
    pieces = await collect(write(teacher, 8, constraint=constraint, prompt_ids=[5, *ids("1")]))
    assert [(piece.token_ids, piece.finish_reason) for piece in pieces] == [
        (ids("2"), None),
        (ids("3"), None),
        ([*ids(" red"), END], "stop"),
    ]
    first, second, third = server.bodies
    assert (first["max_tokens"], "allowed_token_ids" in first) == (8, False)
    assert (second["max_tokens"], second["allowed_token_ids"]) == (1, sorted(DIGITS))
    assert second["prompt"] == [5, *ids("12")]
    assert (third["max_tokens"], "allowed_token_ids" in third) == (6, False)
    assert third["prompt"] == [5, *ids("123")]


@pytest.mark.steady_time
@pytest.mark.parametrize("tokens", [2, 20])
async def test_a_further_request_has_as_long_as_the_first(config, grammars, server, teacher, tokens):
    async def late(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.9 * PATIENCE)
        return await answer(choice(ids("3")))(request)

    async def ends_late(request: web.Request) -> web.StreamResponse:
        response = await begin_events(request)
        await response.write(event(choice(ids("2x"))))
        await asyncio.sleep(5 * END_SECONDS)
        return response

    constraint = await constraint_of(config, grammars, "1", regex="[0-9]{3}")
    streamed = tokens > STREAM_ABOVE
    answer = stream if streamed else body
    first = ends_late if streamed else body(choice(ids("2x")))
    server.answers = [first, late, stream(choice([END], "stop"))]
    pieces = await collect(write(teacher, tokens, constraint=constraint))
    assert [piece.token_ids for piece in pieces][:2] == [ids("2"), ids("3")]


async def test_the_connection_of_a_stream_ends_with_the_refused_token(config, grammars, server, teacher):
    constraint = await constraint_of(config, grammars, "1", regex="[0-9]{3}")
    server.answers = [
        stream(choice(ids("2"), None), choice(ids("x"), None), choice(ids("9"), None), choice([9])),
        stream(choice(ids("3"))),
        stream(choice([END], "stop")),
    ]
    pieces = await collect(write(teacher, 20, constraint=constraint))
    assert [token for piece in pieces for token in piece.token_ids] == [*ids("23"), END]
    assert [asked["max_tokens"] for asked in server.bodies] == [20, 1, 18]


async def test_a_refused_token_is_excluded_if_too_many_are_allowed_to_list_them(
    config, grammars, server, teacher, monkeypatch
):
    monkeypatch.setattr(constrained, "MOST_ALLOWED", 3)
    constraint = await constraint_of(config, grammars, "1", regex="[0-9]{3}")
    server.answers = [body(choice(ids("x"))), body(choice(ids("y"))), body(choice(ids("2")))]
    pieces = await collect(write(teacher, 1, constraint=constraint))
    assert [piece.token_ids for piece in pieces] == [ids("2")]
    biases = [asked.get("logit_bias", {}) for asked in server.bodies]
    x, y = (str(ids(text)[0]) for text in "xy")
    assert biases == [{}, {x: -100.0}, {x: -100.0, y: -100.0}]


async def test_a_token_that_is_asked_for_alone_is_one_of_those_allowed(config, grammars, server, teacher):
    constraint = await constraint_of(config, grammars, "1", regex="[0-9]{3}")
    server.answers = [body(choice(ids("7")))]
    (piece,) = await collect(write(teacher, 1, constraint=constraint, min_tokens=5))
    assert (piece.token_ids, piece.finish_reason) == (ids("7"), "length")
    (asked,) = server.bodies
    assert (asked["allowed_token_ids"], asked["min_tokens"]) == (sorted(DIGITS), 0)


async def test_a_caller_may_allow_fewer_tokens_than_the_grammar(config, grammars, server, teacher):
    constraint = await constraint_of(config, grammars, "1", regex="[0-9]{3}")
    server.answers = [body(choice(DIGITS[7:8]))]
    params = SamplingParams(allowed_token_ids=[*ids("x"), DIGITS[7]])
    await collect(write(teacher, 1, constraint=constraint, params=params))
    assert server.bodies[0]["allowed_token_ids"] == [DIGITS[7]]
    nothing = SamplingParams(allowed_token_ids=ids("x"))
    (piece,) = await collect(write(teacher, 1, constraint=constraint, params=nothing))
    assert (piece.token_ids, piece.finish_reason) == ([], "length")
    assert len(server.bodies) == 1


async def test_a_teacher_that_insists_ends_its_span_and_the_student_goes_on(
    config, grammars, server, teacher, monkeypatch
):
    monkeypatch.setattr(constrained, "MOST_ALLOWED", 3)
    constraint = await constraint_of(config, grammars, "1", regex="[0-9]{3}")
    server.answers = [body(choice(ids("x")))]
    (piece,) = await collect(write(teacher, 8, constraint=constraint))
    assert (piece.token_ids, piece.finish_reason) == ([], "length")
    assert len(server.bodies) == 8


@pytest.mark.parametrize("ending", [[], [END]], ids=["no token", "the end token"])
async def test_a_teacher_cannot_end_a_grammar_that_has_not_ended(config, grammars, server, teacher, ending):
    constraint = await constraint_of(config, grammars, "1", regex="[0-9]{3}")
    server.answers = [body(choice([*ids("2"), *ending], "stop")), body(choice(ids("3")))]
    pieces = await collect(write(teacher, 3, constraint=constraint))
    assert [token for piece in pieces for token in piece.token_ids][:1] == ids("2")
    assert "stop" not in [piece.finish_reason for piece in pieces]


async def test_a_call_at_the_beginning_brings_the_grammar_along(config, grammars, server, teacher):
    constraint = await constraint_of(config, grammars, regex="[0-9]{3}")
    server.answers = [body(choice(ids("12"))), body(choice([*ids("3"), END], "stop"))]
    await collect(write(teacher, 2, constraint=constraint))
    await collect(write(teacher, 2, constraint=constraint, prompt_ids=[5, *ids("12")]))
    assert [asked.get("structured_outputs") for asked in server.bodies] == [{"regex": "[0-9]{3}"}, None]


async def test_a_teacher_that_cannot_compile_a_grammar_is_asked_without_it(config, grammars, server, teacher):
    constraint = await constraint_of(config, grammars, regex="[0-9]{3}")
    server.answers = [body({"error": "no such backend"}, 400), body(choice(ids("12")))]
    (piece,) = await collect(write(teacher, 2, constraint=constraint))
    assert piece.token_ids == ids("12")
    assert "structured_outputs" not in server.bodies[1]


async def test_log_probabilities_end_with_the_tokens(config, grammars, server, teacher):
    constraint = await constraint_of(config, grammars, "1", regex="[0-9]{3}")
    reported = {"token_logprobs": [-0.5, -0.25], "top_logprobs": None, "tokens": ["", ""]}
    alone = {"token_logprobs": [-0.125], "top_logprobs": None, "tokens": [""]}
    server.answers = [
        body(choice(ids("2x"), logprobs=reported)),
        body(choice(ids("3"), logprobs=alone)),
        body(choice([END], "stop", logprobs=alone)),
    ]
    pieces = await collect(write(teacher, 3, constraint=constraint, params=SamplingParams(logprobs=0)))
    values = [list(entry.values()) for piece in pieces for entry in piece.logprobs or ()]
    assert values == [[Logprob(-0.5)], [Logprob(-0.125)], [Logprob(-0.125)]]
