"""The span loop: teachers that fail, or have no place for a call."""

import asyncio
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any

import pytest

from server.completion import Piece
from server.teacher.breaker import Breaker
from server.teacher.errors import TeacherError
from server.vllm_api import GracefulHTTPError
from tests.helpers.scripted_pair import count, on_the_books, shared_by_all, spent, start, tokens, write
from tests.helpers.scripted_student import INF, PROMPT_IDS

# A teacher that fails


async def test_a_lost_teacher_leaves_the_rest_to_the_student(pair):
    engine, teacher = pair(ask_at={2, 6}, fails_at=2)
    result = await write(engine, 0.5, max_tokens=8)
    assert result.text() == "abcdefgh"
    assert result.report.degraded
    assert result.report.denied == {"timeout": 1}
    assert (result.report.calls, result.report.tokens) == (1, 0)
    assert result.report.as_dict()["spans"] == []
    assert spent(engine) == (0, 1)
    assert engine.segments[-1].not_before == 32
    assert len(teacher.calls) == 1


async def test_tokens_of_a_teacher_stay_after_it_is_lost(pair):
    engine, teacher = pair(ask_at={2}, fails_at=4, span_tokens=4)
    result = await write(engine, 0.5, max_tokens=8)
    assert result.text() == "abCDefgh"
    assert (result.report.spans, result.report.tokens) == ([[2, 4]], 2)
    assert spent(engine) == (2, 1)
    assert teacher.calls[0].closed
    assert bytes(engine.segments[-1].prefix) == b"HiabCD"


async def test_a_lost_teacher_can_be_an_error(pair):
    engine, _ = pair(ask_at={2}, fails_at=3, on_teacher_error="error")
    failed = count("wheels_requests_total", outcome="error")
    outputs, exchange = start(engine, 0.5)
    written = [(await anext(outputs)).outputs[0].token_ids for _ in range(3)]
    assert written == [[ord("a")], [ord("b")], [ord("C")]]
    with pytest.raises(GracefulHTTPError, match="The teacher did not answer in time") as error:
        await anext(outputs)
    assert error.value.http_status == HTTPStatus.BAD_GATEWAY
    assert spent(engine) == (1, 1)
    assert not exchange.finished
    assert count("wheels_requests_total", outcome="error") - failed == 1


async def test_an_open_breaker_forbids_asking(pair):
    engine, teacher = pair(ask_at={2})
    teacher.breaker.failed()
    result = await write(engine, 0.5)
    assert result.text() == "abcdefgh"
    assert (result.report.degraded, result.report.denied) == (True, {"breaker": 1})
    assert teacher.calls == []
    assert [segment.not_before for segment in engine.segments] == [32]


async def test_a_lost_teacher_is_asked_again_later(pair):
    engine, _ = pair(ask_at={2, 20, 40}, fails_at=2)
    result = await write(engine, 0.5, max_tokens=50)
    assert result.report.spans == [[2, 2], [40, 42]], "not at 20: it has to pause"
    assert (result.report.denied, result.report.degraded) == ({"timeout": 1}, True)
    assert spent(engine) == (2, 2)


@pytest.mark.parametrize("budget", [0.9, 1])
async def test_a_teacher_that_stays_away_is_asked_less_and_less(pair, budget):
    """It is asked at 0, 32 and 96 tokens. The next time would be 128 tokens later, after the end."""
    engine, _ = pair(ask_at=range(1000), refuses="unreachable")
    result = await write(engine, budget, max_tokens=198)
    assert result.report.denied == {"unreachable": 3}
    assert len(result.ids()) == 198
    assert [len(segment.prefix) - len(PROMPT_IDS) for segment in engine.segments][-2:] == [32, 96]


async def test_a_teacher_that_came_back_has_its_whole_budget_of_calls(pair):
    engine, teacher = pair(ask_at=range(1000), refuses="unreachable")
    outputs, exchange = start(engine, {"calls": 1}, max_tokens=198)
    written = 0
    async for output in outputs:
        written += len(output.outputs[0].token_ids)
        teacher.refuses = None if written >= 20 else teacher.refuses
    (report,) = exchange.reports
    assert (report.spans, report.denied) == ([[32, 34]], {"unreachable": 1})


async def test_a_request_that_a_teacher_refused_is_not_sent_again(pair):
    engine, teacher = pair(ask_at=range(1000))

    async def refuse(*_: Any, **__: Any) -> AsyncIterator[Piece]:
        raise TeacherError("status", "too long", refused=True)
        yield

    teacher.write = refuse
    result = await write(engine, 0.9, max_tokens=100)
    assert (result.report.denied, result.report.calls) == ({"status": 1}, 1)
    assert engine.segments[-1].price == INF


async def test_a_breaker_that_opens_meanwhile_refuses_the_span(pair):
    engine, teacher = pair(ask_at={2})
    outputs, exchange = start(engine, 0.5)
    text = ""
    async for output in outputs:
        teacher.breaker.failed()  # in another request
        text += bytes(output.outputs[0].token_ids).decode()
    assert text == "abcdefgh"
    assert exchange.total().denied == {"breaker": 1}
    assert exchange.total().degraded
    assert spent(engine) == (0, 0)
    assert teacher.calls == []


@pytest.mark.parametrize(("context", "text"), [(4, "abcdefgh"), (5, "abCdefgh"), (6, "abCDefgh")])
async def test_the_teachers_context_bounds_a_span(pair, context, text):
    engine, _ = pair(ask_at={2}, max_model_len=context)  # two tokens of the prompt, two of the student
    result = await write(engine, {"calls": 1})
    assert result.text() == text
    assert result.report.denied == ({"context": 1} if context == 4 else {})
    assert not result.report.degraded


# A place at the teacher


async def test_the_same_prompt_goes_to_the_same_replica(pair):
    engine, teacher = pair(ask_at={2, 6})
    await write(engine, 0.5, max_tokens=10, n=2)
    assert len(teacher.admitted) == 4
    assert len(set(teacher.admitted)) == 1
    assert teacher.released == 4


async def test_a_saturated_teacher_is_asked_again_later(pair):
    engine, teacher = pair(ask_at={2, 20, 40}, refuses="saturated")
    outputs, exchange = start(engine, 0.5, max_tokens=50)
    text = ""
    async for output in outputs:
        text += bytes(output.outputs[0].token_ids).decode()
        if len(text) == 30:
            teacher.refuses = None
    (report,) = exchange.reports
    assert report.spans == [[40, 42]], "not at 20: PAUSE_TOKENS have to pass"
    assert (report.denied, report.degraded, report.calls) == ({"saturated": 1}, False, 1)
    assert spent(engine) == (2, 1)


async def test_a_refused_span_is_charged_to_no_budget(pair):
    shared = shared_by_all(tokens(100))
    engine, teacher = pair(ask_at={2, 6}, refuses="breaker", shared=shared)
    result = await write(engine, {"calls": 1}, max_tokens=8)
    assert result.text() == "abcdefgh"
    assert (result.report.denied, result.report.degraded) == ({"breaker": 1}, True)
    assert (spent(engine), result.report.calls, teacher.released) == ((0, 0), 0, 0)
    assert await on_the_books(shared) == (0, 0, 8)


@pytest.mark.parametrize("limit", [0, 2])
async def test_a_refused_budget_does_not_use_up_the_breakers_trial(pair, limit):
    """A shared budget does not use it up either: the trial is taken when all else is reserved."""
    clock = [0.0]
    engine, teacher = pair(ask_at={0}, shared=shared_by_all(tokens(limit)))
    teacher.breaker = Breaker(1, 10.0, lambda: clock[0])
    teacher.breaker.failed()
    clock[0] = 11.0
    await write(engine, {"calls": 1})
    assert teacher.breaker.open is (limit > 0)


async def test_a_client_that_leaves_while_waiting_for_the_teacher_holds_nothing(pair):
    shared = shared_by_all(tokens(100))
    engine, teacher = pair(ask_at={2}, shared=shared)
    waits = asyncio.Event()

    async def admit(key: bytes) -> None:
        waits.set()
        await asyncio.Event().wait()

    teacher.admit = admit
    task = asyncio.create_task(write(engine, 0.5))
    await waits.wait()
    task.cancel()
    await asyncio.wait([task])
    assert spent(engine) == (0, 0)
    assert await on_the_books(shared) == (0, 0, 2)


@pytest.mark.parametrize("on_teacher_error", ["degrade", "error"])
async def test_a_teacher_lost_with_nothing_left_to_spend_does_not_degrade_the_answer(pair, on_teacher_error):
    engine, teacher = pair(ask_at={2}, on_teacher_error=on_teacher_error)
    outputs, exchange = start(engine, {"calls": 1})
    async for _ in outputs:
        if exchange.reports[0].calls:
            teacher.breaker.failed()
    (report,) = exchange.reports
    assert (report.tokens, report.degraded, report.denied) == (2, False, {})


async def test_a_teacher_that_is_down_can_be_an_error(pair):
    engine, teacher = pair(ask_at={2}, on_teacher_error="error")
    teacher.breaker.failed()
    with pytest.raises(GracefulHTTPError, match="No teacher is available"):
        await write(engine, 0.5)
