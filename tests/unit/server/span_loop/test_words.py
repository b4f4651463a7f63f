"""Budgets in words: the student reads them, the teacher and the caller do not."""

from dataclasses import replace
from typing import Any

import pytest

from router.budget import Budget
from router.words import BudgetWords
from server.exchange import Exchange
from server.original_prompt import OriginalPrompt
from server.vllm_api import SamplingParams
from tests.helpers.scripted_pair import Engine, Result
from tests.helpers.scripted_student import DELTA, PROMPT, PROMPT_IDS

WORDS = BudgetWords("{percent}%", (0.1, 0.5))
CONTEXT = 200
"""Context of the scripted student, in tokens."""


async def ask(engine: Engine, budget: Any, render: Any, **params: Any) -> Result:
    engine.cooperator.cooperation = replace(engine.cooperator.cooperation, words=WORDS)
    exchange = Exchange(Budget.model_validate(budget))
    exchange.originals.append((PROMPT, OriginalPrompt({}, render=render)))
    sampling = SamplingParams(**{"max_tokens": 8, "output_kind": DELTA} | params)
    return Result([output async for output in engine.generate(sampling, exchange)], exchange)


async def in_front(words: str) -> list[int] | None:
    return [*words.encode(), *PROMPT_IDS]


@pytest.mark.parametrize(("budget", "words"), [(0.2, b"10%"), (0.4, b"50%"), ({"tokens": 4}, b"50%")])
async def test_the_student_alone_reads_the_words(pair, budget: Any, words: bytes) -> None:
    """The student's prompt has three tokens more, so its fifth place is the completion's third."""
    engine, teacher = pair(ask_at={5})
    result = await ask(engine, budget, in_front, max_tokens=8)
    assert [bytes(segment.prefix[:5]) for segment in engine.segments] == [words + b"Hi"] * 2
    assert [bytes(call.prefix) for call in teacher.calls] == [b"Hide"]
    assert result.outputs[0].prompt_token_ids == PROMPT_IDS
    assert result.report.tokens > 0


@pytest.mark.parametrize("budget", [0, 1, {"tokens": 0}])
async def test_budgets_without_a_decision_have_no_words(pair, budget: Any) -> None:
    engine, _ = pair()
    await ask(engine, budget, in_front)
    assert all(bytes(segment.prefix[:2]) == b"Hi" for segment in engine.segments)


async def nowhere(words: str) -> None:
    return None


async def too_long(words: str) -> list[int]:
    raise ValueError("the prompt is longer than the context")


async def full(words: str) -> list[int]:
    return [1] * CONTEXT


@pytest.mark.parametrize("render", [None, nowhere, too_long, full])
async def test_a_prompt_that_has_no_place_for_the_words_goes_without(pair, render: Any) -> None:
    engine, _ = pair()
    result = await ask(engine, 0.5, render)
    assert [bytes(segment.prefix) for segment in engine.segments] == [b"Hi"]
    assert result.text() == "abcdefgh"


async def test_the_words_take_room_in_the_context(pair) -> None:
    engine, _ = pair()
    result = await ask(engine, 0.5, in_front, max_tokens=None)
    assert len(result.ids()) == CONTEXT - len(b"50%Hi")
    assert result.last.finish_reason == "length"
