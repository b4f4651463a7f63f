"""The span loop: clients that leave, and clients that read slowly."""

import asyncio
import contextlib

import pytest

from tests.helpers.scripted_pair import (
    collect,
    count,
    on_the_books,
    shared_by_all,
    spent,
    start,
    tokens,
    write,
)

# Clients that leave


async def test_leaving_amid_a_span_closes_the_call_and_settles(pair):
    engine, teacher = pair(ask_at={2}, span_tokens=4)
    aborted = count("wheels_requests_total", outcome="aborted")
    outputs, exchange = start(engine, 0.5)
    text = ""
    async for output in outputs:
        text += bytes(output.outputs[0].token_ids).decode()
        if text.endswith("D"):
            break
    assert spent(engine) == (4, 1)  # reserved
    await outputs.aclose()
    assert spent(engine) == (2, 1)
    assert teacher.calls[0].closed
    assert not exchange.finished
    assert count("wheels_requests_total", outcome="aborted") - aborted == 1


async def test_leaving_amid_a_segment_closes_it(pair):
    engine, teacher = pair()
    outputs, _ = start(engine, 0.5)
    await anext(outputs)
    await outputs.aclose()
    assert engine.segments[0].closed
    assert teacher.calls == []


async def test_leaving_a_plain_request_closes_it(pair):
    engine, _ = pair()
    outputs, _ = start(engine, 0)
    await anext(outputs)
    await outputs.aclose()
    assert engine.segments[0].closed


async def test_cancelling_while_the_teacher_hangs_closes_the_call_and_settles(pair):
    engine, teacher = pair(ask_at={2}, hangs_at=3, span_tokens=4)
    task = asyncio.create_task(write(engine, 0.5))
    await teacher.hanging.acquire()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert teacher.calls[0].closed
    assert spent(engine) == (1, 1)


async def test_a_client_that_leaves_two_choices_closes_both(pair):
    engine, teacher = pair(ask_at={2}, hangs_at=3, span_tokens=4)
    task = asyncio.create_task(write(engine, 0.5, n=2))
    await teacher.hanging.acquire()
    await teacher.hanging.acquire()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    for _ in range(10):  # the iterators of both choices end in tasks of their own
        await asyncio.sleep(0)
    assert [call.closed for call in teacher.calls] == [True, True]
    assert engine.spent == [1, 1]


# Clients that read slowly


async def test_a_client_that_does_not_read_holds_nothing(pair):
    """The whole completion is written, paid and settled while the client has read one token."""
    shared = shared_by_all(tokens(100))
    engine, teacher = pair(ask_at={2}, span_tokens=4, shared=shared)
    outputs, exchange = start(engine, 0.9, max_tokens=8)
    first = await anext(outputs)
    for _ in range(100):  # the models write on
        await asyncio.sleep(0)
    assert [segment.closed for segment in engine.segments] == [True, True]
    assert await on_the_books(shared) == (4, 0, 4)
    assert teacher.released == 1
    rest = await collect(outputs)
    read = b"".join(bytes(output.outputs[0].token_ids) for output in (first, *rest))
    assert read == b"abCDEFgh"
    assert exchange.finished


async def test_tokens_written_while_a_client_leaves_are_counted_and_charged_alike(pair):
    shared = shared_by_all(tokens(100))
    engine, teacher = pair(ask_at={2}, span_tokens=4, shared=shared, hangs_at=3, writes_on=True)
    before = count("wheels_completion_tokens_total", source="teacher")
    outputs, _ = start(engine, 0.9, max_tokens=8)
    await anext(outputs)
    await teacher.hanging.acquire()
    await outputs.aclose()
    spent, reserved, _ = await on_the_books(shared)
    assert (spent, reserved) == (4, 0)
    assert count("wheels_completion_tokens_total", source="teacher") - before == spent


async def test_a_slow_reader_gets_the_authors_of_all_tokens_too(pair):
    engine, _ = pair(ask_at={2})
    outputs, exchange = start(engine, 0.5, max_tokens=6)
    seen = []
    async for output in outputs:
        for _ in range(20):  # both models are ahead
            await asyncio.sleep(0)
        seen.append((bytes(output.outputs[0].token_ids).decode(), exchange.latest.source))
    assert [source for text, source in seen] == [
        "teacher" if text.isupper() else "student" for text, _ in seen
    ]
