"""The span loop: endings of completions, and rules that hold them back."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from server.completion import Piece
from server.teacher.ask import Ask
from server.vllm_api import Logprob, ReasoningMarkers
from server.written import WRITTEN
from tests.helpers.scripted_pair import (
    ScriptedTeacher,
    count,
    on_the_books,
    shared_by_all,
    spent,
    tokens,
    write,
)
from tests.helpers.scripted_student import DELTA, EOS, FINAL_ONLY, INF

# Stop strings, minimum lengths, seeds


@pytest.mark.parametrize(
    ("stop", "shown", "kept"), [("bC", "a", "abC"), ("CD", "ab", "abCD"), ("De", "abC", "abCDe")]
)
@pytest.mark.parametrize("kind", [DELTA, FINAL_ONLY])
async def test_a_stop_string_ends_the_completion_wherever_it_is(pair, stop, shown, kept, kind):
    engine, teacher = pair(ask_at={2}, span_tokens=4 if stop == "CD" else 2)
    result = await write(engine, 0.5, stop=[stop], output_kind=kind)
    assert "".join(new.text for new in result.choice()) == shown
    assert result.text() == kept
    assert (result.last.finish_reason, result.last.stop_reason) == ("stop", stop)
    assert [output.finished for output in result.outputs].count(True) == 1
    assert all(call.closed for call in teacher.calls)
    assert all(segment.closed for segment in engine.segments)
    assert result.report.completion_tokens == len(kept)
    assert result.report.tokens == sum(character.isupper() for character in kept)


async def test_min_tokens_hold_the_ending_back_but_not_the_question(pair):
    engine, teacher = pair(ask_at={1}, ends_at=4, span_tokens=1)
    result = await write(engine, 0.5, min_tokens=6, max_tokens=9)
    assert result.text() == "aBcdefghi"
    assert [call.min_tokens for call in teacher.calls] == [5]  # one was written
    assert [segment.params.min_tokens for segment in engine.segments] == [6, 4]
    assert [segment.params.max_tokens for segment in engine.segments] == [9, 7]


@pytest.mark.parametrize(
    "counting", [{"frequency_penalty": 0.5}, {"presence_penalty": 0.5}, {"bad_words": ["zz"]}]
)
async def test_what_counts_the_completion_knows_where_it_begins(pair, counting):
    engine, teacher = pair(ask_at={2})
    result = await write(engine, {"tokens": 2}, max_tokens=6, **counting)
    assert result.text() == "abCDef"
    first, second = (segment.params for segment in engine.segments)
    ((name, value),) = counting.items()
    assert getattr(first, name) == getattr(second, name) == value
    assert (first.extra_args.get(WRITTEN), second.extra_args[WRITTEN]) == (None, 4)
    (ask,) = teacher.asks
    assert (ask.written, getattr(ask.params, name)) == (2, value)


async def test_min_tokens_do_not_change_the_largest_length(pair):
    engine, _ = pair(ends_at=4)
    result = await write(engine, 0.5, min_tokens=2, max_tokens=9)
    assert (result.text(), result.last.finish_reason) == ("abcd", "stop")


async def test_every_segment_has_a_seed_of_its_own(pair):
    engine, teacher = pair(ask_at={2, 6})
    await write(engine, 0.5, max_tokens=10, seed=7)
    seeds = [s.params.seed for s in engine.segments] + [call.seed for call in teacher.calls]
    assert seeds[0] == 7
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


async def test_the_same_seed_gives_the_same_seeds(pair):
    async def seeds() -> list[int]:
        engine, _ = pair(ask_at={2})
        await write(engine, 0.5, seed=2**63 - 1)
        return [segment.params.seed for segment in engine.segments]

    assert await seeds() == await seeds()


async def test_without_a_seed_segments_have_none(pair):
    engine, teacher = pair(ask_at={2})
    await write(engine, 0.5)
    assert [s.params.seed for s in engine.segments] == [None, None]
    assert [call.seed for call in teacher.calls] == [None]


# A teacher that writes over the end


def whole_spans(teacher: ScriptedTeacher, text: bytes, ends: int | None = None) -> None:
    """Let the teacher write each span of this text in one piece; some servers ignore our end tokens."""

    async def write(slot: Any, ask: Ask, **_: Any) -> AsyncIterator[Piece]:
        ids = [EOS if place == ends else token for place, token in enumerate(text[: ask.tokens])]
        yield Piece(ids, [{token: Logprob(-0.5)} for token in ids], "length")

    teacher.write = write


@pytest.mark.parametrize("kind", [DELTA, FINAL_ONLY])
async def test_the_students_end_token_ends_a_span(pair, kind):
    shared = shared_by_all(tokens(100))
    engine, teacher = pair(ask_at={2}, span_tokens=8, shared=shared)
    whole_spans(teacher, b"CDEFGHIJ", ends=3)
    result = await write(engine, 0.9, max_tokens=20, output_kind=kind, logprobs=0)
    assert (result.text(), result.ids()[-1]) == ("abCDE", EOS)
    assert (result.last.finish_reason, result.last.stop_reason) == ("stop", None)
    assert result.report.spans == [[2, 6]]
    assert len(engine.segments) == 1
    assert spent(engine) == (4, 1)
    assert await on_the_books(shared) == (4, 0, 2)


async def test_a_callers_stop_token_ends_a_span(pair):
    engine, teacher = pair(ask_at={2}, span_tokens=8)
    whole_spans(teacher, b"CDEFGHIJ")
    result = await write(engine, 0.9, max_tokens=20, stop_token_ids=[ord("E")])
    assert (result.text(), result.last.stop_reason) == ("abCDE", ord("E"))


async def test_a_caller_that_ignores_ends_gets_more_tokens(pair):
    engine, teacher = pair(ask_at={2}, span_tokens=8)
    whole_spans(teacher, b"CDEFGHIJ", ends=3)
    result = await write(engine, {"calls": 1}, max_tokens=12, ignore_eos=True)
    assert len(result.ids()) == 12
    assert result.last.finish_reason == "length"


@pytest.mark.parametrize("kind", [DELTA, FINAL_ONLY])
async def test_tokens_after_a_stop_string_are_not_paid(pair, kind):
    """Bucket, report, usage and metrics agree."""
    shared = shared_by_all(tokens(100))
    engine, teacher = pair(ask_at={2}, span_tokens=8, shared=shared)
    whole_spans(teacher, b"CDEFGHIJ")
    before = count("wheels_completion_tokens_total", source="teacher")
    result = await write(engine, 0.9, max_tokens=20, stop=["DE"], output_kind=kind)
    assert result.text() == "abCDE"
    assert (result.report.tokens, result.report.completion_tokens) == (3, 5)
    assert spent(engine) == (3, 1)
    assert await on_the_books(shared) == (3, 0, 2)
    assert count("wheels_completion_tokens_total", source="teacher") - before == 3


# Thinking, with a budget of three tokens after "b"


def thinking(start: str, end: str) -> dict[str, Any]:
    return {"markers": ReasoningMarkers((ord(start),), (ord(end),), (ord(end),))}


async def test_a_span_ends_where_the_thinking_has_to_end(pair):
    """The student writes the end of the thinking: vLLM does so in its engine."""
    engine, teacher = pair(ask_at={2, 6}, span_tokens=6, student=thinking("b", "f"))
    result = await write(engine, {"tokens": 6}, max_tokens=9, thinking_token_budget=3)
    assert result.text() == "abCDEfGHI"
    assert [call.tokens for call in teacher.calls] == [3, 3]
    assert [segment.params.max_tokens for segment in engine.segments] == [9, 1, 3]
    assert engine.segments[1].price == INF
    assert {segment.params.thinking_token_budget for segment in engine.segments} == {3}


async def test_a_span_in_which_the_thinking_begins_is_cut(pair):
    engine, teacher = pair(student=thinking("B", "f"))
    result = await write(engine, 1, max_tokens=9, thinking_token_budget=3)
    assert result.text() == "ABCDEfGHI"
    assert [call.closed for call in teacher.calls] == [True, True]
    assert result.report.spans == [[0, 5], [6, 9]]
    assert result.report.tokens == 8


async def test_without_a_marker_thinking_is_not_counted(pair):
    engine, teacher = pair(student=thinking("x", "y"))
    result = await write(engine, 1, max_tokens=9, thinking_token_budget=3)
    assert result.text() == "ABCDEFGHI"
    assert len(teacher.calls) == 1
