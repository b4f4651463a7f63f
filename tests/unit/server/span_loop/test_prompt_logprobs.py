"""The log-probabilities of the prompt are the student's, whoever writes."""

import pytest

from router.money import PriceList
from server.vllm_api import Logprob
from tests.helpers.scripted_pair import collect, count, start, write
from tests.helpers.scripted_student import CUMULATIVE, FINAL_ONLY, INF, PROMPT_IDS

OF_HI = [None, {PROMPT_IDS[1]: Logprob(-1.0)}]
"""Log-probabilities of the prompt "Hi", by the scripted student."""


@pytest.mark.parametrize("budget", [0.5, 1])
async def test_the_student_reads_the_prompt_once_before_any_model_writes(pair, budget):
    engine, _ = pair(ask_at={2})
    result = await write(engine, budget, prompt_logprobs=3, max_tokens=6)
    reading, *segments = engine.segments
    assert (bytes(reading.prefix), reading.price) == (b"Hi", INF)
    assert (reading.params.prompt_logprobs, reading.params.max_tokens) == (3, 1)
    assert [segment.params.prompt_logprobs for segment in segments] == [None] * len(segments)
    assert [output.prompt_logprobs for output in result.outputs] == [
        OF_HI,
        *[None] * (len(result.outputs) - 1),
    ]
    assert result.text() == ("abCDef" if budget < 1 else "ABCDEF")
    assert result.report.completion_tokens == 6


async def test_later_segments_find_the_prompt_in_the_cache(pair):
    """vLLM only bypasses its prefix cache for requests for the prompt's log-probabilities."""
    engine, _ = pair(ask_at={2})
    result = await write(engine, 0.5, prompt_logprobs=0)
    assert [segment.params.skip_reading_prefix_cache for segment in engine.segments] == [True, False, False]
    assert result.outputs[0].num_cached_tokens == 0  # of the request that read it, as with one model


async def test_begun_completions_go_before_new_requests(pair):
    engine, _ = pair(ask_at={2})
    await write(engine, 0.5, prompt_logprobs=0)
    assert [segment.options["priority"] for segment in engine.segments] == [1, 0, 0]


@pytest.mark.parametrize("kind", [CUMULATIVE, FINAL_ONLY])
async def test_final_outputs_have_them_too(pair, kind):
    engine, _ = pair(ask_at={2})
    result = await write(engine, 0.5, prompt_logprobs=3, output_kind=kind)
    assert [output.prompt_logprobs for output in result.outputs] == [OF_HI] * len(result.outputs)


async def test_all_choices_have_the_log_probabilities_of_their_one_prompt(pair):
    engine, _ = pair(ask_at={2})
    result = await write(engine, 0.5, prompt_logprobs=3, n=2)
    first = {}
    for output in result.outputs:
        first.setdefault(output.outputs[0].index, output.prompt_logprobs)
    assert first == {0: OF_HI, 1: OF_HI}
    assert sum(segment.params.prompt_logprobs is not None for segment in engine.segments) == 1


async def test_a_prompt_is_not_read_without_need(pair):
    engine, _ = pair(ask_at={2})
    result = await write(engine, 1)
    assert engine.segments == []
    assert {output.prompt_logprobs for output in result.outputs} == {None}


async def test_reading_costs_what_the_student_reads(pair):
    price = {"input": 1, "cached_input": 1, "output": 1}
    engine, _ = pair(prices=PriceList.model_validate({"student": price, "teacher": price}))
    result = await write(engine, 1, prompt_logprobs=0)
    assert result.report.sheet.student.input == len(PROMPT_IDS)


async def test_an_engine_that_cannot_read_it_ends_the_request_once(pair):
    engine, teacher = pair()

    async def fails(*_, **__):
        raise ValueError("the engine is gone")
        yield

    object.__setattr__(engine.cooperator._student, "generate", fails)
    before = count("wheels_requests_total", outcome="error")
    outputs, exchange = start(engine, 1, prompt_logprobs=0)
    with pytest.raises(ValueError, match="the engine is gone"):
        await collect(outputs)
    assert str(exchange.failure) == "the engine is gone"
    assert teacher.calls == []
    assert count("wheels_requests_total", outcome="error") == before + 1


async def test_named_tokens_are_reported_by_whoever_wrote(pair):
    engine, teacher = pair(ask_at={2})
    result = await write(engine, 0.5, logprob_token_ids=[7], max_tokens=4)
    assert [entry for new in result.choice() for entry in new.logprobs]
    assert teacher.asks[0].params.logprob_token_ids == [7]
    assert [segment.params.logprob_token_ids for segment in engine.segments] == [[7]]
