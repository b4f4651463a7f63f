"""Calls of a teacher's client, and readings of their results and metrics."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from prometheus_client import REGISTRY

from server.completion import Piece
from server.teacher.ask import STREAM_ABOVE, Ask
from server.teacher.breaker import Breaker
from server.teacher.client import Teacher
from server.teacher.errors import TeacherError
from server.vllm_api import SamplingParams
from tests.helpers.fake_teacher import Answer, body, stream

SHORT, LONG = STREAM_ABOVE, STREAM_ABOVE + 1  # spans that come as one body, and as a stream
EITHER = pytest.mark.parametrize("tokens", [SHORT, LONG], ids=["body", "stream"])
VOCABULARY = 100
PATIENCE, IMPATIENCE = 20.0, 0.2  # timeouts that must not pass, and that must pass
CALL = ("request_id", "started", "deadline")  # arguments that describe a call and are not sent in `Ask`


def client(url: str, timeout: float = PATIENCE, failures: int = 3, **settings: Any) -> Teacher:
    settings = {"model": "big", "breaker": Breaker(failures, 60.0), "vocabulary": VOCABULARY} | settings
    return Teacher(url, timeout=timeout, **settings)


def either(tokens: int, *replies: object) -> Answer:
    """The replies as a stream, or the last one as a body, depending on the span's length."""
    return stream(*replies) if tokens > STREAM_ABOVE else body(replies[-1])


def write(teacher: Teacher, tokens: int, **given: Any) -> AsyncIterator[Piece]:
    call = {"request_id": "r-1"} | {name: given.pop(name) for name in CALL if name in given}
    ask = {"prompt_ids": [1, 2, 3], "params": SamplingParams()} | given
    return teacher.write(Ask(tokens=tokens, **ask), **call)


async def collect(pieces: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in pieces]


async def failure(pieces: AsyncIterator[Piece]) -> TeacherError:
    with pytest.raises(TeacherError) as error:
        await collect(pieces)
    return error.value


def calls(teacher: Teacher, outcome: str) -> float:
    labels = {"teacher": teacher.of, "replica": teacher.name, "outcome": outcome}
    return REGISTRY.get_sample_value("wheels_teacher_calls_total", labels) or 0.0


async def hang_up(request: web.Request) -> web.StreamResponse:
    request.transport.abort()
    return web.Response()
