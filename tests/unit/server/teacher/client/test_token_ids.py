"""A teacher that takes and returns token ids alone, and the JSON of the ids."""

from typing import Any

import msgspec
import pytest

from server.teacher.ask import SpelledIds
from server.vllm_api import SamplingParams
from tests.helpers.fake_teacher import body, choice
from tests.helpers.teacher_calls import EITHER, calls, collect, either, failure, write

pytestmark = pytest.mark.steady_time

GENERATE = "/inference/v1/generate"
COMPLETIONS = "/v1/completions"


def spelled(ids: SpelledIds, *lists: list[int]) -> list[int]:
    found: list[int] = msgspec.json.decode(ids.spell(*lists))
    return found


async def paths(server, teacher, **given) -> list[str]:
    """Paths of the requests of one call."""
    before = len(server.requests)
    await collect(write(teacher, 1, **given))
    return [request.path for request in server.requests[before:]]


@EITHER
async def test_a_teacher_that_offers_it_is_asked_by_token_ids_alone(server, teacher, tokens):
    server.generates = 400
    server.answers = [
        either(tokens, {"choices": [{"index": 0, "token_ids": [7], "finish_reason": "length"}]})
    ]
    await teacher.connect()
    params = SamplingParams(temperature=0.5, stop_token_ids=[4], logit_bias={7: 2.0})
    (piece,) = await collect(
        write(teacher, tokens, params=params, seed=11, min_tokens=1, cache_salt="pepper")
    )
    assert (piece.token_ids, piece.finish_reason) == ([7], "length")
    assert server.requests[-1].path == GENERATE
    sent = server.bodies[-1]
    assert (sent["model"], sent["token_ids"], sent["cache_salt"]) == ("big", [1, 2, 3], "pepper")
    assert sent["stream"] is (tokens > 8)
    sampling = sent["sampling_params"]
    assert sampling["detokenize"] is False
    assert (sampling["max_tokens"], sampling["min_tokens"], sampling["seed"]) == (tokens, 1, 11)
    assert (sampling["temperature"], sampling["stop_token_ids"]) == (0.5, [4])
    assert sampling["logit_bias"] == {"7": 2.0}
    assert not {"prompt", "return_token_ids", "max_tokens"} & sent.keys()


@pytest.mark.parametrize(
    "given",
    [
        {"params": SamplingParams(logprobs=1)},
        {"params": SamplingParams(bad_words=["no"])},
        {"as_text": True},
        {"grammar": {"structured_outputs": {"regex": "a"}}},
    ],
    ids=["logprobs", "bad words", "text", "grammar"],
)
async def test_a_call_that_needs_text_is_sent_as_to_any_teacher(server, teacher, given):
    server.generates = 400
    top = {"token_logprobs": [-1.0], "top_logprobs": [{"token_id:7": -1.0}]}
    entry = choice([7], logprobs=top)
    server.answers = [either(9 if given.get("as_text") else 1, entry)]
    await teacher.connect()
    assert await paths(server, teacher, **given) == [COMPLETIONS]


@pytest.mark.parametrize("status", [403, 404, 405, 500])
async def test_a_teacher_without_the_endpoint_is_asked_for_a_completion(server, teacher, status):
    server.generates = status
    server.answers = [body(choice([7]))]
    await teacher.connect()
    assert not teacher.generates
    assert await paths(server, teacher) == [COMPLETIONS]


async def test_a_server_that_refuses_any_request_does_not_offer_the_endpoint(server, teacher):
    """A proxy may refuse any request, for example."""
    server.generates = 400
    server.missing = "no such route"
    server.answers = [body(choice([7]))]
    await teacher.connect()
    assert await paths(server, teacher) == [COMPLETIONS]


@pytest.mark.parametrize("status", [403, 404])
async def test_a_teacher_that_has_lost_the_endpoint_is_asked_again_within_the_call(server, teacher, status):
    """The server was restarted without `--enable-scale-out`."""
    server.generates = 400
    await teacher.connect()
    lost = body({"error": {"message": "disabled"}}, status=status)
    server.answers = [lost, body(choice([7]))]
    before = calls(teacher, "ok")
    assert await paths(server, teacher) == [GENERATE, COMPLETIONS]
    assert calls(teacher, "ok") == before + 1
    assert await paths(server, teacher) == [COMPLETIONS]


async def test_a_teacher_that_forbids_both_is_lost(server, teacher):
    server.generates = 400
    await teacher.connect()
    server.answers = [body({"error": {"message": "no"}}, status=403)]
    assert (await failure(write(teacher, 1))).reason == "status"
    assert [request.path for request in server.requests] == [GENERATE, COMPLETIONS]


def test_ids_are_written_as_json() -> None:
    ids = SpelledIds()
    assert bytes(ids.spell([12, 3])) == b"[12,3]"
    assert bytes(ids.spell([12, 3, 400], [5])) == b"[12,3,400,5]"


def test_ids_of_one_call_are_not_kept_for_the_next() -> None:
    ids = SpelledIds()
    assert spelled(ids, [1], [2, 3]) == [1, 2, 3]
    assert spelled(ids, [1, 9]) == [1, 9]
    assert spelled(SpelledIds(), []) == []
    assert spelled(SpelledIds(), [], [4]) == [4]


def test_an_id_is_written_once() -> None:
    """Ids that were spelled before are not spelled again, however many they are."""
    ids = SpelledIds()
    ids.spell([1, 2])
    never_read: Any = object()
    assert spelled(ids, [never_read, never_read, 3]) == [1, 2, 3]


async def test_a_prefix_of_75_000_tokens_goes_out_and_comes_back(server, teacher):
    """The reply has all tokens of the prefix again, as vLLM echoes them."""
    prompt = list(range(75_000))
    server.answers = [body(choice([7], prompt_token_ids=prompt))]
    (piece,) = await collect(write(teacher, 1, prompt_ids=prompt))
    assert piece.token_ids == [7]
    assert server.bodies[0]["prompt"] == prompt
