"""At budget 1 the completion is the teacher's own text, ended as the teacher ends it."""

from typing import Any

import pytest

from server.exchange import Exchange
from tests.helpers.fluent_teacher import END, byte_level
from tests.helpers.scripted_student import EOS, FINAL_ONLY
from tests.unit.server.teacher.translation.conftest import settled, tokens_a_window

TEXT = "The demonstration of 你好 and 🙂🙃 with é, e\u0301 and 👩‍🚀 ends here.\n\n  It does: 12345!"


async def test_the_completion_is_the_teachers_text(pair: Any) -> None:
    async with pair(TEXT) as (engine, teacher):
        written = await engine.write(1)
    assert written.text == TEXT
    assert written.ids == [*TEXT.encode(), EOS]
    assert written.finish == ("stop", None)
    assert written.report.tokens == len(TEXT.encode()) + 1
    assert (written.report.calls, written.report.degraded, written.report.denied) == (1, False, {})
    own = teacher.tokenizer.encode(TEXT)
    assert written.report.own_tokens == len(own) + 1 == written.report.as_dict()["own_tokens"]


async def test_a_client_without_a_stream_gets_the_same_text(pair: Any) -> None:
    async with pair(TEXT) as (engine, _):
        written = await engine.write(1, output_kind=FINAL_ONLY)
    assert (written.text, written.finish) == (TEXT, ("stop", None))


async def test_the_teacher_reads_its_own_template_and_no_token_of_the_student(pair: Any) -> None:
    async with pair(TEXT) as (engine, teacher):
        await engine.write(1)
    assert teacher.asked[0] | {"model": None} == {
        "messages": [{"role": "user", "content": "Hi <|im_end|>"}],
        "add_generation_prompt": True,
        "model": None,
    }
    assert teacher.prompts == [f"<|im_start|>user\nHi {END}{END}\n<|im_start|>assistant\n"]


@pytest.mark.parametrize("leased", [4, 5, 7, 16])
async def test_several_calls_give_the_text_of_one_call(pair: Any, leased: int) -> None:
    """A shared limit gives a few tokens at a time. Each call goes on with the ids that the teacher wrote."""
    async with pair(TEXT, limits=[tokens_a_window(1000)], span_tokens=leased) as (engine, teacher):
        written = await engine.write({"fraction": 1.0, "calls": 900})
        spent = await settled(engine)
    assert written.text == TEXT
    assert written.finish == ("stop", None)
    assert spent == (written.report.tokens, 0)
    assert written.report.tokens == len(TEXT.encode()) + 1
    assert written.report.own_tokens <= 2 * len(teacher.tokenizer.encode(TEXT)) + 1
    assert len(teacher.prompts) <= written.report.calls
    assert all(len(ids) <= leased for ids in spans(written))


def spans(written: Any) -> list[list[int]]:
    return [written.ids[start:end] for start, end in written.report.spans]


async def test_surplus_text_of_a_call_comes_next_without_another_call(pair: Any) -> None:
    """One token of the teacher is 14 tokens of the student, and a span takes four."""
    text = " demonstration" * 3
    theirs = byte_level([text])
    assert len(theirs.encode(text)) == 3
    async with pair(text, theirs=theirs, limits=[tokens_a_window(1000)]) as (engine, teacher):
        written = await engine.write({"fraction": 1.0, "calls": 900})
    assert written.text == text
    assert written.report.calls == 11  # 42 bytes and the end, four at a time
    assert len(teacher.prompts) <= 4
    assert written.report.own_tokens == 4


async def test_a_text_that_is_longer_than_the_completion_is_cut_as_a_models_own(pair: Any) -> None:
    """The last tokens are three of the four bytes of an emoji, as one model would write them."""
    text = "A face: 🙂"
    async with pair(text) as (engine, _):
        written = await engine.write(1, max_tokens=len(text.encode()) - 1)
    assert written.ids == list(text.encode())[:-1]
    assert written.text == "A face: "
    assert written.finish == ("length", None)


async def test_a_stop_string_ends_it_and_nothing_after_is_charged(pair: Any) -> None:
    async with pair("One, two, three, four") as (engine, _):
        written = await engine.write(1, stop=["two"])
    assert written.text == "One, "
    assert written.finish == ("stop", "two")
    assert written.report.tokens == len("One, two")


async def test_several_choices_share_one_prompt(pair: Any) -> None:
    async with pair("Same for all.") as (engine, _):
        written = await engine.write(1, n=3)
    texts = ["", "", ""]
    for output in written.outputs:
        for new in output.outputs:
            texts[new.index] += new.text
    assert texts == ["Same for all."] * 3
    assert written.exchange.total().own_tokens == 3 * (written.report.own_tokens or 0)
    assert isinstance(written.exchange, Exchange)
