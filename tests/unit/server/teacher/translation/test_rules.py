"""Forbidden tokens and endings of a request, applied to the student's tokens of the teacher's text."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

from server.grammar.constraint import Continuation
from tests.helpers.fake_teacher import body
from tests.helpers.scripted_student import EOS

GRAMMAR = {"structured_outputs": {"regex": "[a-z ]*"}}
CONSTRAINED = {"structured_outputs": StructuredOutputsParams(regex="[a-z ]*")}
"""A grammar that a scripted constraint replaces by a rule of its own."""


@dataclass
class WithoutBytes:
    """A grammar that refuses some bytes, and perhaps the end. The scripted student follows it."""

    refused: Sequence[int]
    begun: bool = False

    def constrain(self, *_: Any) -> "WithoutBytes":
        return self

    @property
    def fields(self) -> dict[str, Any]:
        return {} if self.begun else GRAMMAR

    async def catch_up(self, token_ids: Sequence[int]) -> bool:
        self.begun = bool(token_ids)
        return True

    def take(self, token_ids: Sequence[int]) -> int:
        taken = 0
        while taken < len(token_ids) and self.allows(token_ids[taken]):
            taken += 1
        return taken

    def allows(self, token_id: int) -> bool:
        return token_id not in self.refused

    def continuation(self, prompt_tokens: int) -> Continuation:
        return Continuation({}, {})


def without(*refused: int) -> dict[str, Any]:
    return {"constrain": WithoutBytes(refused).constrain}


async def test_a_text_is_cut_where_the_grammar_refuses_it_and_the_student_goes_on(pair: Any) -> None:
    """The student writes small letters by their place: "e" is the fifth."""
    async with pair("WELL! no", ask_at={5}, student=without(ord("!"))) as (engine, teacher):
        written = await engine.write(1, max_tokens=10, **CONSTRAINED)
    assert written.text == "WELLeWELLW"
    assert written.by_teacher == "WELL|WELL|W"
    assert (written.report.denied, written.report.degraded) == ({}, False)
    assert len(teacher.prompts) == 4  # one of them in vain: the teacher insists on a refused text


async def test_only_the_call_at_the_beginning_gets_the_grammar(pair: Any) -> None:
    async with pair("WELL! no", ask_at={5}, student=without(ord("!"))) as (engine, teacher):
        await engine.write(1, max_tokens=10, **CONSTRAINED)
    assert [sent.get("structured_outputs") for sent in teacher.bodies] == [
        GRAMMAR["structured_outputs"],
        None,
        None,
        None,
    ]


async def test_a_teacher_that_does_not_take_the_grammar_is_asked_without(pair: Any) -> None:
    async with pair("WELL", student=without(ord("!"))) as (engine, teacher):
        teacher.answers = [body({"error": {"message": "no backend", "code": 400}}, 400), *teacher.answers]
        written = await engine.write(1, **CONSTRAINED)
    assert written.text == "WELL"
    assert ["structured_outputs" in sent for sent in teacher.bodies] == [True, False]


async def test_a_text_that_fits_ends_as_the_teacher_ends_it(pair: Any) -> None:
    async with pair("WELL, yes", student=without(ord("!"))) as (engine, _):
        written = await engine.write(1, **CONSTRAINED)
    assert (written.text, written.finish) == ("WELL, yes", ("stop", None))
    assert written.report.calls == 1


async def test_the_teacher_cannot_end_while_the_grammar_wants_more(pair: Any) -> None:
    async with pair("WELL", student=without(EOS), ends_at=6) as (engine, _):
        written = await engine.write(1, **CONSTRAINED)
    assert written.text == "WELLef"  # the student's own engine knows whether it may end
    assert written.finish == ("stop", None)
    assert written.report.spans[-1] == [4, 4]  # the teacher had nothing more to write


async def test_the_teachers_text_never_contains_a_bad_word(pair: Any) -> None:
    async with pair("A BAD END", ends_at=9) as (engine, teacher):
        written = await engine.write(1, bad_words=["BAD"], max_tokens=12)
    assert written.text == "A BAefghi"
    assert teacher.bodies[0]["bad_words"] == ["BAD"]  # it gets the bad word as text, and avoids it by itself


async def test_a_bad_word_across_a_border_is_found(pair: Any) -> None:
    async with pair("cY", ask_at={2}, ends_at=6) as (engine, _):
        written = await engine.write({"calls": 1}, bad_words=["abc"], max_tokens=12)
    assert written.text == "abcdef"  # the third one is the scripted student's, who keeps to nothing
    assert written.report.tokens == 0


@pytest.mark.parametrize("shown", [False, True])
async def test_a_stop_token_ends_the_completion_whoever_wrote_it(pair: Any, shown: bool) -> None:
    stop = {"stop_token_ids": [ord("!")], "include_stop_str_in_output": shown}
    async with pair("WELL! no") as (engine, _):
        written = await engine.write(1, **stop)
    assert written.text == ("WELL!" if shown else "WELL")
    assert written.finish == ("stop", ord("!"))
    assert written.report.tokens == 5


async def test_an_ignored_end_of_the_teacher_does_not_end_the_completion(pair: Any) -> None:
    async with pair("One. ") as (engine, teacher):
        written = await engine.write(1, ignore_eos=True, max_tokens=12)
    assert written.text == "One. One. On"
    assert written.finish == ("length", None)
    assert teacher.bodies[0]["ignore_eos"] is True


async def test_a_repetition_in_the_teachers_text_is_found(pair: Any) -> None:
    detection = RepetitionDetectionParams(max_pattern_size=3, min_pattern_size=3, min_count=3)
    async with pair("Yes, well, no no no no no no no") as (engine, _):
        written = await engine.write(1, repetition_detection=detection)
    assert written.text == "Yes, well, no no no"
    assert written.finish == ("repetition", "repetition_detected")
    assert written.report.tokens == len("Yes, well, no no no")


async def test_the_teacher_is_told_of_the_students_adapter(pair: Any) -> None:
    async with pair("WELL") as (engine, teacher):
        teacher.models = {"data": [{"id": "big"}, {"id": "tuned"}]}
        (named,) = engine.engine.cooperation.teachers.models
        await named.pool.replicas[0].teacher.connect()
        await engine.write(1, options={"lora_request": SimpleNamespace(lora_name="tuned")})
    assert [sent["model"] for sent in teacher.bodies] == ["tuned"]
