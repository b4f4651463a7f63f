from collections.abc import AsyncGenerator

import pytest

from server.vllm_api import CompletionOutput, Logprob, RequestOutput, SamplingParams
from server.whole_vocabulary import reports_all, tokens_only

FOUR = {2: Logprob(-0.5), 0: Logprob(-1.0), 1: Logprob(-2.0), 3: Logprob(-float("inf"))}


async def one_output() -> AsyncGenerator[RequestOutput, None]:
    new = CompletionOutput(0, "", [2], -0.5, [dict(FOUR)], finish_reason="length")
    yield RequestOutput("r", None, [1, 2], [None, dict(FOUR)], [new], finished=True)


async def test_rows_without_a_token_have_no_log_probability():
    """The last row is the router's. No token of the prompt or the completion could have been that row."""
    (output,) = [output async for output in tokens_only(one_output(), visible=3)]
    assert [list(entry) for entry in output.outputs[0].logprobs] == [[2, 0, 1]]
    assert output.prompt_logprobs[0] is None
    assert list(output.prompt_logprobs[1]) == [2, 0, 1]


@pytest.mark.parametrize(
    ("params", "all_of_them"),
    [({"logprobs": -1}, True), ({"prompt_logprobs": -1}, True), ({"logprobs": 20}, False), ({}, False)],
)
def test_only_minus_one_asks_for_the_whole_vocabulary(params, all_of_them):
    assert reports_all(SamplingParams(**params)) is all_of_them
