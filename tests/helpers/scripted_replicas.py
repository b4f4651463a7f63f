"""Scripted replicas of a teacher, and their pool."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from server.completion import Piece
from server.teacher.ask import Ask
from server.teacher.breaker import Breaker
from server.teacher.errors import TeacherError
from server.teacher.pool import TeacherPool

KEYS = [n.to_bytes(16) for n in range(300)]
DOWN = TeacherError("unreachable", "the script says so")


class Replica:
    """A replica that writes three tokens. A test can hold back the second token, and set failures."""

    def __init__(self, number: int) -> None:
        self.url = f"http://replica-{number}:8000"
        self.name = f"replica-{number}:8000"
        self.of = ""
        self.model = "big"
        self.max_model_len: int | None = None
        self.breaker = Breaker(2, 60.0)
        self.absent: TeacherError | None = None
        self.silent = False
        self.fails_before: int | None = None
        self.vocabulary = "ours"
        self.calls = 0
        self.started: list[float] = []

    async def __aenter__(self) -> "Replica":
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def connect(self) -> None:
        if self.absent:
            raise self.absent

    def first_wait(self, prompt_tokens: int) -> float:
        return 10.0

    async def healthy(self) -> bool | None:
        return None if self.silent else self.absent is None

    async def write(self, ask: Ask, *, started: float) -> AsyncIterator[Piece]:
        self.calls += 1
        self.started.append(started)
        for token in range(ask.tokens):
            await asyncio.sleep(0)
            if token == self.fails_before:
                self.breaker.failed()
                raise DOWN
            yield Piece([token], None, "length" if token + 1 == ask.tokens else None)
        self.breaker.succeeded()


async def pool_of(count: int, *, concurrency: int = 100, queue: float = 5.0) -> TeacherPool:
    pool = TeacherPool([Replica(n) for n in range(count)], concurrency=concurrency, queue_seconds=queue)
    await pool.connect()
    return pool


def teachers(pool: TeacherPool) -> list[Replica]:
    return [replica.teacher for replica in pool.replicas]


async def where(pool: TeacherPool, key: bytes) -> str:
    slot = await pool.admit(key)
    slot.release()
    return slot.replica.teacher.name


def running(pool: TeacherPool) -> list[int]:
    return [replica.running for replica in pool.replicas]


async def refusal(pool: TeacherPool) -> str:
    with pytest.raises(TeacherError) as error:
        await pool.admit(KEYS[0])
    return error.value.reason
