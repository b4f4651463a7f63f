import pytest

from router.reserved import ReservedRows
from server.parameters import check_reserved_rows, unsupported
from server.vllm_api import SamplingParams, VLLMValidationError

RESERVED = ReservedRows(start=100, count=4)
PROMPT = {"type": "token", "prompt_token_ids": [1, 2, 99]}


def params(**given: object) -> SamplingParams:
    return SamplingParams(**given)


# Parameters that two models cannot honour


@pytest.mark.parametrize("penalty", ["frequency_penalty", "presence_penalty"])
def test_a_penalty_that_another_one_scales_cannot_be_continued(penalty):
    both = params(**{penalty: 0.5}, repetition_penalty=1.1)
    assert unsupported(PROMPT, both) == penalty


@pytest.mark.parametrize(
    "supported",
    [
        {},
        {"presence_penalty": 0.0, "bad_words": []},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3},
        {"stop": ["x"], "stop_token_ids": [5], "min_tokens": 3, "max_tokens": 9, "ignore_eos": True},
        {"n": 4, "logprobs": 0, "logit_bias": {3: -5.0}, "allowed_token_ids": [3, 4]},
        {"repetition_penalty": 1.1},
        {"frequency_penalty": -0.5, "presence_penalty": 0.5},
        {"bad_words": ["damn"]},
        {"thinking_token_budget": 0},
        {"prompt_logprobs": 0},
        {"prompt_logprobs": -1, "logprobs": -1},
        {"logprob_token_ids": [3]},
    ],
)
def test_everything_else_can_be_honoured(supported):
    assert unsupported(PROMPT, params(**supported)) is None


@pytest.mark.parametrize("prompt", ["text", [1, 2, 3], {"type": "embeds"}, {"type": "multimodal"}])
def test_a_prompt_that_is_not_token_ids_cannot_be_sent_to_a_teacher(prompt):
    assert unsupported(prompt, params()) == "prompt"


# Rows that a client may not use


@pytest.mark.parametrize(
    ("parameter", "given"),
    [
        ("stop_token_ids", {"stop_token_ids": [5, 100]}),
        ("allowed_token_ids", {"allowed_token_ids": [103, 5]}),
        ("logit_bias", {"logit_bias": {101: 5.0}}),
        ("logprob_token_ids", {"logprob_token_ids": [5, 102]}),
    ],
)
def test_a_reserved_row_is_refused_by_the_parameter_that_names_it(parameter, given):
    with pytest.raises(VLLMValidationError, match="token ids from 100 to 103 are reserved") as refusal:
        check_reserved_rows(PROMPT, params(**given), RESERVED)
    assert refusal.value.parameter == parameter


def test_a_prompt_with_a_reserved_row_is_refused():
    with pytest.raises(VLLMValidationError) as refusal:
        check_reserved_rows({"type": "token", "prompt_token_ids": [1, 100]}, params(), RESERVED)
    assert (refusal.value.parameter, refusal.value.value) == ("prompt", 100)


def test_a_reserved_row_in_a_chat_is_in_its_messages():
    with pytest.raises(VLLMValidationError) as refusal:
        check_reserved_rows(
            {"type": "token", "prompt_token_ids": [100]}, params(), RESERVED, {"prompt": "messages"}
        )
    assert refusal.value.parameter == "messages"


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"stop_token_ids": [99], "allowed_token_ids": [0, 99], "logit_bias": {99: 1.0}},
        {"stop_token_ids": []},
        {"logit_bias": {104: 1.0}, "allowed_token_ids": [2**40]},  # vLLM says that there is no such id
    ],
)
def test_visible_ids_may_be_named(given):
    check_reserved_rows(PROMPT, params(**given), RESERVED)


@pytest.mark.parametrize("prompt", ["text", {"type": "embeds"}, {"type": "token", "prompt_token_ids": []}])
def test_a_prompt_without_ids_names_no_row(prompt):
    check_reserved_rows(prompt, params(), RESERVED)
