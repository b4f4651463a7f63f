"""Rules over the whole completion, at a teacher that is asked for a span."""

import pytest

from server.teacher.carried import Screen
from server.vllm_api import Logprob, SamplingParams
from tests.helpers.fake_teacher import body, choice, stream
from tests.helpers.teacher_calls import EITHER, LONG, SHORT, VOCABULARY, collect, either, failure, write

pytestmark = pytest.mark.steady_time

WRITTEN = {"prompt_ids": [1, 2, 3, 5, 5, 6], "written": 3}  # three of the prompt, three of the completion


def bad_words(*words: list[int]) -> SamplingParams:
    params = SamplingParams(bad_words=["as text"])
    params._bad_words_token_ids = list(words)
    return params


# Penalties


async def test_penalties_for_written_tokens_are_sent_as_biases(server, teacher):
    """The prompt's own tokens have no bias: vLLM counts them for `repetition_penalty` only."""
    server.answers = [body(choice([7]))]
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25, logit_bias={4: 1.0, 6: 1.0})
    await collect(write(teacher, 1, params=params, **WRITTEN))
    (sent,) = server.bodies
    assert sent["logit_bias"] == {"4": 1.0, "5": -1.25, "6": 0.25}
    assert (sent["frequency_penalty"], sent["presence_penalty"]) == (0.5, 0.25)


@EITHER
async def test_a_token_that_comes_again_is_not_charged_twice(server, teacher, tokens):
    """vLLM would subtract its own penalty and the bias. So the teacher stops there, and is asked again."""
    server.answers = [
        either(tokens, choice([7, 5], "stop", stop_reason=5)),
        either(tokens, choice([8, 7], "stop", stop_reason=7)),
        either(tokens, choice([9, 10], "length")),
    ]
    pieces = await collect(write(teacher, tokens, params=SamplingParams(presence_penalty=2.0), **WRITTEN))
    assert [piece.token_ids for piece in pieces] == [[7, 5], [8, 7], [9, 10]]
    assert [piece.finish_reason for piece in pieces] == [None, None, "length"]
    assert [body["stop_token_ids"] for body in server.bodies] == [[5, 6], [5, 6, 7], [5, 6, 7, 8]]
    assert [body["max_tokens"] for body in server.bodies] == [tokens, tokens - 2, tokens - 4]
    assert server.bodies[1]["prompt"] == [1, 2, 3, 5, 5, 6, 7, 5]
    assert server.bodies[1]["logit_bias"] == {"5": -2.0, "6": -2.0, "7": -2.0}
    assert len(server.connections) == 1, "the replies were read to their ends"


async def test_a_token_that_comes_again_may_be_the_last_of_the_span(server, teacher):
    params = SamplingParams(presence_penalty=2.0)
    for last in (choice([7, 5], "stop", stop_reason=5), choice([7, 5], "length")):
        server.answers = [body(last)]
        (piece,) = await collect(write(teacher, 2, params=params, **WRITTEN))
        assert (piece.token_ids, piece.finish_reason) == ([7, 5], "length")
    assert len(server.bodies) == 2


async def test_if_no_end_is_allowed_yet_the_reply_is_cut(server, teacher):
    """With `min_tokens` vLLM writes no stop token, so stopping there would keep these tokens out entirely."""
    logprobs = {"token_logprobs": [-0.1, -0.2, -0.3], "top_logprobs": [{}, {}, {}]}
    last = {"token_logprobs": [-0.4], "top_logprobs": [{}]}
    server.answers = [
        body(choice([7, 5, 9], logprobs=logprobs)),
        body(choice([8], "stop", stop_reason=8, logprobs=last)),
    ]
    params = SamplingParams(presence_penalty=2.0, logprobs=0, stop_token_ids=[8])
    pieces = await collect(write(teacher, 3, params=params, min_tokens=2, **WRITTEN))
    assert [piece.token_ids for piece in pieces] == [[7, 5], [8]]
    assert pieces[0].logprobs == [{7: Logprob(-0.1)}, {5: Logprob(-0.2)}]
    assert (pieces[1].finish_reason, pieces[1].stop_reason) == ("stop", 8)
    assert [body["stop_token_ids"] for body in server.bodies] == [[8], [8, 5, 6, 7]]
    assert [body["min_tokens"] for body in server.bodies] == [2, 0]


async def test_the_teachers_own_end_stays_one(server, teacher):
    server.answers = [body(choice([7, 5], "stop"))]
    (piece,) = await collect(write(teacher, SHORT, params=SamplingParams(presence_penalty=2.0), **WRITTEN))
    assert (piece.token_ids, piece.finish_reason) == ([7, 5], "stop")


async def test_without_a_penalty_for_presence_nothing_is_asked_twice(server, teacher):
    server.answers = [body(choice([5, 5, 6], "length"))]
    params = SamplingParams(frequency_penalty=2.0, repetition_penalty=1.5)
    (piece,) = await collect(write(teacher, 3, params=params, **WRITTEN))
    assert piece.token_ids == [5, 5, 6]
    assert "stop_token_ids" not in server.bodies[0]


# Bad words


@EITHER
async def test_a_bad_word_that_begins_before_the_span_is_not_ended_in_it(server, teacher, tokens):
    """The token that would end the bad word is drawn again, with that one excluded, and the rest after it."""
    server.answers = [
        either(tokens, choice([9, 8], "length")),
        either(tokens, choice([8], "length")),
        either(tokens, choice([9, 4], "stop", stop_reason=4)),
    ]
    params = bad_words([5, 6, 9], [7])
    params.stop_token_ids = [4]
    pieces = await collect(write(teacher, tokens, params=params, seed=3, **WRITTEN))
    assert [piece.token_ids for piece in pieces] == [[8], [9, 4]]
    assert [piece.finish_reason for piece in pieces] == [None, "stop"]
    assert [body["max_tokens"] for body in server.bodies] == [tokens, 1, tokens - 1]
    assert [body.get("logit_bias") for body in server.bodies] == [None, {"9": -100.0}, None]
    assert [body["bad_words"] for body in server.bodies] == [["as text"]] * 3
    assert len({body["seed"] for body in server.bodies}) == 3


async def test_a_bad_word_may_begin_in_one_request_and_end_in_another(server, teacher):
    server.answers = [
        body(choice([7, VOCABULARY], "length")),
        body(choice([8, 9], "length")),
        body(choice([10], "length")),
        body(choice([11], "stop")),
    ]
    pieces = await collect(write(teacher, SHORT, params=bad_words([6, 7, 8, 9]), **WRITTEN))
    assert [piece.token_ids for piece in pieces] == [[7], [8], [10], [11]]


async def test_the_last_token_of_a_span_may_be_drawn_again(server, teacher):
    server.answers = [body(choice([9], "length")), body(choice([8], "length"))]
    (piece,) = await collect(write(teacher, 1, params=bad_words([6, 9]), **WRITTEN))
    assert (piece.token_ids, piece.finish_reason) == ([8], "length")


async def test_a_bad_word_does_not_begin_in_the_prompt(server, teacher):
    server.answers = [body(choice([9], "length"))]
    (piece,) = await collect(write(teacher, 1, params=bad_words([3, 5, 5, 6, 9]), **WRITTEN))
    assert piece.token_ids == [9]


@pytest.mark.parametrize("tokens", [1, LONG])
async def test_a_teacher_that_writes_only_bad_words_is_given_up_and_not_blamed(server, teacher, tokens):
    server.answers = [either(tokens, choice([9], "length"))]
    error = await failure(write(teacher, tokens, params=bad_words([6, 9]), **WRITTEN))
    assert (error.reason, error.well) == ("nonsense", True)
    assert len(server.bodies) == 8


async def test_a_stream_is_cut_where_the_bad_word_would_end(server, teacher):
    server.answers = [
        stream(choice([7], None), choice([8], None), choice([9], None), choice([10])),
        stream(choice([11])),
        stream(choice([12], "stop")),
    ]
    pieces = await collect(write(teacher, LONG, params=bad_words([6, 7, 8, 9]), **WRITTEN))
    assert [piece.token_ids for piece in pieces] == [[7], [8], [11], [12]]


def test_a_screen_without_rules_looks_at_no_token():
    screen = Screen.of(SamplingParams(frequency_penalty=1.0), [5, 6])
    assert (screen.charged, screen.bad_words, screen.reach) == (frozenset(), (), 0)
