"""Borders between the two models: whole characters, hard bounds, and no special token from text."""

import asyncio
from typing import Any

import pytest

from server.vllm_api import GracefulHTTPError
from tests.helpers.fake_teacher import begin_events, choice, event
from tests.helpers.fluent_teacher import END, byte_level
from tests.helpers.scripted_student import EOS, RecitingLLM
from tests.unit.server.teacher.translation.conftest import settled, tokens_a_window

FACE = "🙂"


async def test_the_teacher_reads_what_the_student_wrote(pair: Any, tokenizer: Any) -> None:
    """The teacher gets the text as its own tokenizer splits it, although two models wrote it."""
    student = RecitingLLM(tokenizer, "Sure: the demon", ask_at={15})
    text = "Sure: the demonstration"
    theirs = byte_level([text])
    async with pair(text, vllm=student, theirs=theirs) as (engine, teacher):
        written = await engine.write({"calls": 1}, max_tokens=19)
    assert written.text == "Sure: the demonstra"
    assert written.by_teacher == "stra"
    assert teacher.prompts[0].endswith("<|im_start|>assistant\nSure: the demon")
    assert [body["prompt"] for body in teacher.asked[1:]] == ["Sure: the demon"]


@pytest.mark.parametrize("ask_at", [1, 2, 3, 4, 5])
async def test_the_teacher_is_asked_after_the_students_half_character(
    pair: Any, tokenizer: Any, ask_at: int
) -> None:
    """At whatever byte of the emoji the student asks, it writes the emoji to its end first."""
    student = RecitingLLM(tokenizer, f"a{FACE}b", ask_at=range(ask_at, 6))
    async with pair("TEACHER", vllm=student) as (engine, teacher):
        written = await engine.write({"calls": 1}, max_tokens=9)
    start = 1 if ask_at == 1 else 5
    assert written.report.spans == [[start, start + 4]]
    assert "\ufffd" not in written.text + teacher.prompts[0]
    assert teacher.prompts[0].endswith("assistant\na" if start == 1 else f"assistant\na{FACE}")


async def test_a_run_of_bytes_that_is_no_character_does_not_keep_the_teacher_away(
    pair: Any, tokenizer: Any
) -> None:
    student = RecitingLLM(tokenizer, "a", ask_at=range(1, 30))
    student.characters = [bytes([0xFF])]
    async with pair("TEACHER", vllm=student) as (engine, _):
        written = await engine.write({"calls": 1}, max_tokens=12)
    assert written.report.spans == [[4, 8]]


@pytest.mark.parametrize("granted", [1, 2, 3, 4, 5, 6])
async def test_a_span_ends_at_a_whole_character_within_its_grant(
    pair: Any, tokenizer: Any, granted: int
) -> None:
    student = RecitingLLM(tokenizer, "s", ask_at={1})
    async with pair(f"x{FACE}y", vllm=student, span_tokens=granted) as (engine, _):
        written = await engine.write({"calls": 1}, max_tokens=30)
    assert written.by_teacher == {1: "x", 2: "x", 3: "x", 4: "x", 5: f"x{FACE}", 6: f"x{FACE}y"}[granted]
    assert written.report.tokens == len(written.by_teacher.encode()) <= granted


async def test_a_character_that_no_grant_can_hold_is_left_to_the_student(pair: Any, tokenizer: Any) -> None:
    student = RecitingLLM(tokenizer, "s", ask_at=range(1, 100))
    async with pair(FACE * 5, vllm=student, span_tokens=3) as (engine, _):
        written = await engine.write({"calls": 4}, max_tokens=12)
    assert written.text == "s" * 12
    assert (written.report.tokens, written.report.calls) == (0, 4)


async def test_text_of_the_student_discards_the_kept_rest_of_the_teacher(pair: Any, tokenizer: Any) -> None:
    """The kept rest of the teacher's word fits only the beginning that the teacher wrote."""
    student = RecitingLLM(tokenizer, "s", ask_at={1, 7})
    async with pair("demonstration", vllm=student) as (engine, teacher):
        written = await engine.write({"calls": 2}, max_tokens=13)
    assert written.text == "sdemossdemoss"
    assert [prompt.rsplit("\n", 1)[-1] for prompt in teacher.prompts] == ["s", "sdemoss"]


async def test_special_tokens_that_the_teacher_writes_are_text(pair: Any, tokenizer: Any) -> None:
    student = RecitingLLM(tokenizer, "x", ask_at={1})
    text = "see <eos> and <eos>?"
    async with pair(text, vllm=student, span_tokens=30) as (engine, _):
        written = await engine.write({"calls": 1}, max_tokens=80)
    assert written.ids == [ord("x"), *text.encode(), EOS]
    assert written.text == f"x{text}"


async def test_the_teachers_prompt_has_no_special_token_of_what_was_written(
    pair: Any, tokenizer: Any
) -> None:
    typed = f"It is {END}, twice: {END}"
    student = RecitingLLM(tokenizer, typed, ask_at={len(typed)})
    bodies: list[list[int]] = []
    async with pair("TEACHER", vllm=student) as (engine, teacher):
        recite = teacher._recite

        async def keep(request: Any) -> Any:
            bodies.append((await request.json())["prompt"])
            return await recite(request)

        teacher.answers = [keep]
        await engine.write({"calls": 1}, max_tokens=40)
        end = teacher.tokenizer.eos_token_id
    (prompt,) = bodies
    assert prompt.count(end) == 2  # of the user's message, which stock vLLM reads so, and the template's own
    assert teacher.tokenizer.decode(prompt).endswith(typed)


async def test_characters_without_tokens_of_the_student_are_left_to_it(pair: Any, tokenizer: Any) -> None:
    student = RecitingLLM(tokenizer, "s", ask_at={1})
    async with pair(f"ab{FACE}", vllm=student, span_tokens=8) as (engine, _):
        words = engine.engine.cooperation.teachers.models[0].translator.student
        words._special_ids = words._special_ids | {FACE.encode()[1]}  # a student without this byte
        written = await engine.write({"calls": 1}, max_tokens=20)
    assert written.by_teacher == "ab"
    assert written.report.denied == {"characters": 1}
    assert written.report.degraded is False


async def test_an_end_for_which_there_is_no_room_comes_with_the_next_grant(pair: Any, tokenizer: Any) -> None:
    student = RecitingLLM(tokenizer, "s", ask_at={1, 5})
    async with pair("four", vllm=student) as (engine, teacher):
        written = await engine.write({"calls": 2}, max_tokens=20)
    assert written.ids == [ord("s"), *b"four", EOS]
    assert written.report.spans == [[1, 5], [5, 6]]
    assert written.finish == ("stop", None)
    assert len(teacher.prompts) == 1


async def test_the_teacher_does_not_end_before_min_tokens(pair: Any, tokenizer: Any) -> None:
    student = RecitingLLM(tokenizer, "s", ask_at={1})
    async with pair("no", vllm=student, span_tokens=8) as (engine, teacher):
        written = await engine.write({"calls": 1}, max_tokens=9, min_tokens=8)
    assert written.text == "snossssss"
    assert teacher.bodies[0]["min_tokens"] == 7
    assert written.finish == ("length", None)


async def test_a_full_context_of_the_teacher_is_no_loss(pair: Any, tokenizer: Any) -> None:
    student = RecitingLLM(tokenizer, "s", ask_at={3})
    async with pair("TEACHER", vllm=student) as (engine, teacher):
        prompt = len(teacher.tokenizer.encode(f"<|im_start|>user\nHi {END}{END}\n<|im_start|>assistant\n"))
        engine.engine.cooperation.teachers.models[0].pool.replicas[0].teacher.max_model_len = prompt + 3
        written = await engine.write({"calls": 1}, max_tokens=9)
    assert written.text == "s" * 9
    assert (written.report.denied, written.report.degraded) == ({"context": 1}, False)


async def test_a_teacher_that_cannot_tokenize_is_lost_for_a_while(pair: Any, tokenizer: Any) -> None:
    student = RecitingLLM(tokenizer, "s", ask_at={3})
    async with pair("TEACHER", vllm=student, limits=[tokens_a_window(100)]) as (engine, teacher):
        teacher.tokenizer = None
        written = await engine.write({"calls": 1}, max_tokens=9)
        assert await settled(engine) == (0, 0)
    assert written.text == "s" * 9
    assert (written.report.denied, written.report.degraded) == ({"status": 1}, True)


async def test_text_before_a_fault_is_kept(pair: Any, tokenizer: Any) -> None:
    student = RecitingLLM(tokenizer, "s", ask_at={1})
    async with pair("One two three", vllm=student, span_tokens=40) as (engine, teacher):

        async def dies(request: Any) -> Any:
            response = await begin_events(request)
            await response.write(event(choice([5, 6], None, text="One tw")))
            request.transport.abort()
            return response

        teacher.answers = [dies]
        written = await engine.write({"calls": 1}, max_tokens=50)
    assert written.by_teacher == "One tw"
    assert written.report.denied == {"unreachable": 1}


async def test_a_lost_teacher_is_an_error_if_so_configured(pair: Any, tokenizer: Any) -> None:
    student = RecitingLLM(tokenizer, "s", ask_at={3})
    async with pair("TEACHER", vllm=student, on_teacher_error="error") as (engine, teacher):
        teacher.tokenizer = None
        with pytest.raises(GracefulHTTPError, match="answered with an error"):
            await engine.write({"calls": 1}, max_tokens=9)


PIECES = ["Grüße 🙂", "你好世界", "e\u0301a\u0308", "👩‍🚀👨‍👩‍👧", "plain words", "नमस्ते", "🏳️‍🌈 x", "tab\t\n"]


async def test_five_hundred_at_once_keep_their_bounds_and_their_characters(pair: Any, tokenizer: Any) -> None:
    text = " ".join(PIECES)
    student = RecitingLLM(tokenizer, text, ask_at=range(0, 10_000, 5))
    async with pair(text, vllm=student, span_tokens=6) as (engine, teacher):
        teacher.ends = False
        teacher.after = lambda prompt: (text * 3)[len(prompt) % len(text) :][:60]  # type: ignore[method-assign]
        runs = [engine.write(0.2, max_tokens=24 + n % 7, seed=n) for n in range(500)]
        everything = await asyncio.gather(*runs)
    called = 0
    for written in everything:
        report = written.report
        called += report.calls
        assert report.tokens <= 0.2 * len(written.ids) + 6
        assert report.denied == {}
        assert "\ufffd" not in written.text
        for start, end in report.as_dict()["spans"]:
            if end < len(written.ids):  # the last one ends with the completion
                assert bytes(written.ids[start:end]).decode()
    assert called >= 500
    assert not [prompt for prompt in teacher.prompts if "\ufffd" in prompt]
