"""The span loop: the authors of tokens, and the outputs that the caller gets."""

import pytest

from tests.helpers.scripted_pair import spent, start, write
from tests.helpers.scripted_student import CUMULATIVE, EOS, FINAL_ONLY, PROMPT_IDS

# Who writes what


async def test_two_models_write_one_completion(pair):
    engine, teacher = pair(ask_at={2, 6})
    result = await write(engine, 0.5, max_tokens=10)
    assert result.text() == "abCDefGHij"
    assert (result.report.spans, result.report.tokens, result.report.calls) == ([[2, 4], [6, 8]], 4, 2)
    assert result.report.completion_tokens == 10
    assert result.report.denied == {}
    assert not result.report.degraded
    assert result.last.finish_reason == "length"
    assert spent(engine) == (4, 2)
    assert [call.tokens for call in teacher.calls] == [2, 2]


async def test_every_prefix_is_prompt_and_completion_without_a_trace_of_asking(pair):
    engine, teacher = pair(ask_at={2, 6})
    await write(engine, 0.5, max_tokens=10)
    assert [bytes(segment.prefix) for segment in engine.segments] == [b"Hi", b"HiabCD", b"HiabCDefGH"]
    assert [bytes(call.prefix) for call in teacher.calls] == [b"Hiab", b"HiabCDef"]


async def test_a_span_may_follow_a_span(pair):
    engine, _ = pair(ask_at={1, 3})
    result = await write(engine, 0.5, max_tokens=6)
    assert result.text() == "aBCDEf"
    assert result.report.spans == [[1, 3], [3, 5]]


async def test_a_span_may_be_asked_for_token_by_token(pair):
    """After every token of the teacher, the gate decides whether to ask for another."""
    engine, teacher = pair(ask_at={2, 3, 4}, span_tokens=4, ask_tokens=1)
    result = await write(engine, 0.5, max_tokens=8)
    assert result.text() == "abCDEfgh"
    assert [call.tokens for call in teacher.calls] == [1, 1, 1]
    assert result.report.spans == [[2, 3], [3, 4], [4, 5]]
    assert spent(engine) == (3, 3)


async def test_a_span_may_come_first(pair):
    engine, _ = pair(ask_at={0})
    assert (await write(engine, 0.5, max_tokens=4)).text() == "ABcd"


async def test_a_span_ends_at_max_tokens(pair):
    engine, teacher = pair(ask_at={3}, span_tokens=4)
    result = await write(engine, 0.5, max_tokens=5)
    assert result.text() == "abcDE"
    assert teacher.calls[0].tokens == 2
    assert (result.last.finish_reason, result.outputs[-1].finished) == ("length", True)


async def test_every_output_says_who_wrote_it(pair):
    engine, _ = pair(ask_at={2})
    outputs, exchange = start(engine, 0.5, max_tokens=5)
    seen = [(bytes(o.outputs[0].token_ids).decode(), exchange.latest.source) async for o in outputs]
    assert [entry for entry in seen if entry[0]] == [
        ("a", "student"),
        ("b", "student"),
        ("C", "teacher"),
        ("D", "teacher"),
        ("e", "student"),
    ]
    assert exchange.finished


async def test_the_student_may_end_it(pair):
    engine, _ = pair(ask_at={2}, ends_at=5)
    result = await write(engine, 0.5)
    assert (result.text(), result.ids()[-1]) == ("abCDe", EOS)
    assert result.last.finish_reason == "stop"


async def test_the_teacher_may_end_it(pair):
    engine, teacher = pair(ask_at={2}, ends_at=9, span_tokens=4)
    teacher.ends_at = 3
    result = await write(engine, 0.5, max_tokens=20)
    assert (result.text(), result.ids()[-1]) == ("abC", EOS)
    assert result.last.finish_reason == "stop"
    assert result.report.spans == [[2, 4]]
    assert spent(engine) == (2, 1)  # four were reserved
    assert len(engine.segments) == 1


# What the caller gets


@pytest.mark.parametrize("kind", [CUMULATIVE, FINAL_ONLY])
async def test_outputs_have_the_requested_kind(pair, kind):
    engine, _ = pair(ask_at={2})
    result = await write(engine, 0.5, max_tokens=6, output_kind=kind)
    assert (result.last.text, bytes(result.last.token_ids)) == ("abCDef", b"abCDef")
    assert [output.finished for output in result.outputs].count(True) == 1
    assert result.outputs[-1].finished
    if kind == FINAL_ONLY:
        assert len(result.outputs) == 1


async def test_outputs_name_the_request_as_the_caller_did(pair):
    engine, _ = pair(ask_at={2})
    result = await write(engine, 0.5)
    for output in result.outputs:
        assert (output.request_id, output.prompt, output.prompt_token_ids) == ("r", "Hi", PROMPT_IDS)
        assert output.num_cached_tokens == 1  # in the first segment: half of its prefix


async def test_log_probabilities_are_of_whoever_wrote_the_token(pair):
    engine, _ = pair(ask_at={2})
    result = await write(engine, 0.5, max_tokens=6, logprobs=0)
    entries = [entry for new in result.choice() for entry in new.logprobs]
    assert [entry[token].logprob for entry, token in zip(entries, result.ids(), strict=True)] == [
        -1.0,
        -1.0,
        -0.5,
        -0.5,
        -1.0,
        -1.0,
    ]
    assert result.last.cumulative_logprob == -5.0


async def test_no_output_is_empty(pair):
    engine, _ = pair(ask_at={2, 6})
    result = await write(engine, 0.5, max_tokens=10)
    assert all(output.outputs[0].token_ids for output in result.outputs)


# Several choices


async def test_choices_are_written_apart(pair):
    engine, teacher = pair(ask_at={2})
    result = await write(engine, 0.5, n=3, max_tokens=6, seed=7)
    assert [result.text(index) for index in range(3)] == ["abCDef"] * 3
    assert [report.spans for report in result.exchange.reports] == [[[2, 4]]] * 3
    assert len(teacher.calls) == 3
    first = [s.params.seed for s in engine.segments if bytes(s.prefix) == b"Hi"]
    assert sorted(first) == [7, 8, 9]
    assert all(segment.params.n == 1 for segment in engine.segments)
    assert [output.finished for output in result.outputs] == [False] * (len(result.outputs) - 1) + [True]


async def test_final_choices_come_together_in_order(pair):
    engine, _ = pair(ask_at={2})
    result = await write(engine, 0.5, n=3, max_tokens=6, output_kind=FINAL_ONLY)
    (output,) = result.outputs
    assert output.finished
    assert [(new.index, new.text) for new in output.outputs] == [(i, "abCDef") for i in range(3)]


async def test_every_choice_has_the_whole_budget(pair):
    engine, _ = pair(ask_at=range(100))
    result = await write(engine, {"tokens": 2}, n=2, max_tokens=5)
    assert [report.tokens for report in result.exchange.reports] == [2, 2]
