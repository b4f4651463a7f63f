"""The span loop: parameters that the engine cannot take, and refusals."""

import pytest

from server.gate_processor import TERMS
from server.teacher.carried import MOST_BIASES
from server.vllm_api import VLLMValidationError
from tests.helpers.scripted_pair import start, write
from tests.helpers.scripted_student import PROMPT_IDS, RESERVED, VOCABULARY

# What the engine cannot take

MANY = 1025 - RESERVED.count


@pytest.mark.parametrize("budget", [0, 0.5, 1])
@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("logit_bias", dict.fromkeys(range(300, 300 + MANY), 1.0)),
        ("allowed_token_ids", list(range(300, 300 + MANY))),
        ("bad_words", ["x" * 600, "y" * 600]),
        ("stop", ["a\ud800"]),
        ("bad_words", ["\udfff"]),
    ],
)
async def test_parameters_that_would_end_the_engine_are_refused_at_every_budget(
    pair, budget, parameter, value
):
    engine, teacher = pair(ask_at={2})
    with pytest.raises(VLLMValidationError) as error:
        start(engine, budget, **{parameter: value})
    assert error.value.parameter == parameter
    assert (engine.segments, teacher.calls) == ([], [])


@pytest.mark.parametrize("budget", [0, 0.5])
async def test_the_largest_numbers_that_the_engine_takes_are_accepted(pair, budget):
    engine, _ = pair(ask_at={2})
    ids = range(300, 299 + MANY)
    await write(engine, budget, logit_bias=dict.fromkeys(ids, 1.0))
    await write(engine, budget, allowed_token_ids=list(ids))
    await write(engine, budget, stop_token_ids=list(range(300, 500)))
    assert max(len(segment.params.allowed_token_ids or ()) for segment in engine.segments) <= 1024


@pytest.mark.parametrize("budget", [0, 0.5])
async def test_stop_tokens_are_counted_where_they_are_masked(pair, budget):
    engine, _ = pair(ask_at={2})
    stop_token_ids = list(range(300, 300 + 113))
    with pytest.raises(VLLMValidationError) as error:
        start(engine, budget, stop_token_ids=stop_token_ids, min_tokens=1)
    assert error.value.parameter == "stop_token_ids"
    await write(engine, budget, stop_token_ids=stop_token_ids[:-1], min_tokens=1)


@pytest.mark.parametrize("budget", [0.9, 1, {"calls": 3}])
@pytest.mark.parametrize("penalty", ["frequency_penalty", "presence_penalty"])
@pytest.mark.parametrize("others", [900, 980, 985])
async def test_a_penalty_never_has_more_biases_than_the_engine_takes(pair, budget, penalty, others):
    """Written tokens become biases. If there is no room for more, the student ends the completion alone."""
    engine, teacher = pair(ask_at=range(0, 1000, 5), span_tokens=3)
    bias = dict.fromkeys(range(300, 300 + others), 0.5)
    asked = {penalty: 0.5, "logit_bias": bias}
    result = await write(engine, budget, max_tokens=150, **asked)
    assert len(result.ids()) == 150
    for ask in teacher.asks:
        assert others + len(set(ask.prompt_ids[len(PROMPT_IDS) :])) + ask.tokens <= MOST_BIASES
    assert all(segment.params.logit_bias == bias for segment in engine.segments)
    if others > 980 and budget != {"calls": 3}:
        assert result.report.denied == {"penalty": 1}
        assert not result.report.degraded


# What is refused

SCALED = {"presence_penalty": 1.0, "repetition_penalty": 1.2}


async def test_a_parameter_that_two_models_cannot_honour_is_refused(pair):
    engine, _ = pair()
    with pytest.raises(VLLMValidationError, match="teacher_budget above 0") as error:
        start(engine, 0.5, **SCALED)
    assert error.value.parameter == "presence_penalty"
    with pytest.raises(VLLMValidationError) as error:
        start(engine, 0.5, unsupported="use_beam_search")
    assert error.value.parameter == "use_beam_search"
    assert engine.segments == []


async def test_a_refusal_names_the_parameter_as_it_was_sent(pair):
    engine, _ = pair()
    with pytest.raises(VLLMValidationError, match="messages cannot be used") as error:
        start(engine, 0.5, prompt={"type": "multimodal"}, names={"prompt": "messages"})
    assert error.value.parameter == "messages"


@pytest.mark.parametrize("budget", [None, 0, 0.5, 1])
async def test_a_request_that_writes_nothing_spends_nothing(pair, budget):
    """For the prompt's log-probabilities alone, vLLM writes a token and throws it away."""
    engine, teacher = pair(ask_at={0}, default=0.5)
    result = await write(engine, budget, prompt_logprobs=1, max_tokens=1, writes_nothing=True)
    assert result.report.tokens == 0
    assert teacher.calls == []


@pytest.mark.parametrize("budget", [0.5, 1])
async def test_parameters_that_vllm_refuses_for_one_model_are_refused_for_two(pair, budget):
    """Segments have other parameters: they add the reserved rows to an empty choice of tokens."""
    engine, teacher = pair()
    for parameters in ({"allowed_token_ids": []}, {"logprobs": 21}, {"logit_bias": {VOCABULARY: 1.0}}):
        with pytest.raises(VLLMValidationError) as error:
            start(engine, budget, **parameters)
        assert error.value.parameter in parameters
    assert (engine.segments, teacher.calls) == ([], [])


@pytest.mark.parametrize("budget", [None, 0])
async def test_without_a_budget_of_its_own_such_a_request_is_the_students_alone(pair, budget):
    engine, teacher = pair(ask_at={2})
    result = await write(engine, budget, **SCALED)
    assert result.text() == "abcdefgh"
    assert engine.segments[0].params.presence_penalty == 1.0
    assert teacher.calls == []


@pytest.mark.parametrize("budget", [0, 0.5, 1])
async def test_clients_cannot_use_reserved_rows_or_set_the_price(pair, budget):
    engine, _ = pair()
    with pytest.raises(VLLMValidationError, match="reserved"):
        start(engine, budget, stop_token_ids=[RESERVED.escalation])
    for term in TERMS:
        with pytest.raises(VLLMValidationError, match="are the router's own"):
            start(engine, budget, extra_args={term: 0})
