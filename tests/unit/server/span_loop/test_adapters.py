"""A student with a LoRA adapter: every segment has it, and the teacher is told its name."""

from types import SimpleNamespace

import pytest

from tests.helpers.scripted_pair import write
from tests.helpers.scripted_student import PROMPT_IDS

TUNED = SimpleNamespace(lora_name="tuned")


async def test_every_segment_has_the_adapter_and_the_teacher_is_told_its_name(pair):
    engine, teacher = pair(ask_at={2, 6})
    result = await write(engine, 0.5, max_tokens=10, options={"lora_request": TUNED}, prompt_logprobs=0)
    assert result.text() == "abCDefGHij"
    assert [segment.options["lora_request"] for segment in engine.segments] == [TUNED] * 4
    assert [bytes(segment.prefix) for segment in engine.segments][:2] == [bytes(PROMPT_IDS)] * 2
    assert [ask.adapter for ask in teacher.asks] == ["tuned", "tuned"]


async def test_without_an_adapter_the_teacher_is_told_of_none(pair):
    engine, teacher = pair(ask_at={2})
    await write(engine, 0.5, options={"lora_request": None})
    assert [ask.adapter for ask in teacher.asks] == [None]


@pytest.mark.parametrize(("sent", "text"), [("cheap", "abcdefgh"), ("tuned", "ABCDEFGH")])
async def test_an_adapters_name_may_have_a_budget(pair, sent, text):
    engine, _ = pair(models={"cheap": 0, "tuned": 1}, default=0)
    result = await write(engine, model=sent, options={"lora_request": TUNED})
    assert result.text() == text
