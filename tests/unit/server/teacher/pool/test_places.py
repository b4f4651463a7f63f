"""The choice of the teacher's replica for a call, and of another one in its place."""

from collections import Counter
from collections.abc import AsyncIterator

import pytest

from server.completion import Piece
from server.teacher.ask import Ask
from server.teacher.breaker import Breaker
from server.teacher.errors import TeacherError
from server.teacher.pool import Slot, TeacherPool
from server.vllm_api import SamplingParams
from tests.helpers.scripted_replicas import KEYS, pool_of, refusal, running, teachers, where

pytestmark = pytest.mark.steady_time

ASK = Ask([1], 3, SamplingParams())


async def write(pool: TeacherPool, slot: Slot) -> list[int]:
    try:
        return [token async for piece in pool.write(slot, ASK) for token in piece.token_ids]
    finally:
        slot.release()


# Who is asked


async def test_a_key_stays_at_its_replica_and_keys_are_spread():
    pool = await pool_of(3)
    places = [await where(pool, key) for key in KEYS]
    assert places == [await where(pool, key) for key in KEYS]
    assert min(Counter(places).values()) > len(KEYS) / 3 * 0.7


async def test_a_replica_that_leaves_moves_its_own_keys_only():
    pool = await pool_of(3)
    before = {key: await where(pool, key) for key in KEYS}
    pool.replicas[1].up = False
    after = {key: await where(pool, key) for key in KEYS}
    moved = {key for key in KEYS if before[key] != after[key]}
    assert moved == {key for key in KEYS if before[key] == "replica-1:8000"}
    assert len({after[key] for key in moved}) == 2, "to all that are left"
    pool.replicas[1].up = True
    assert {key: await where(pool, key) for key in KEYS} == before


async def test_a_full_replica_hands_on_to_the_next():
    pool = await pool_of(2, concurrency=2)
    slots = [await pool.admit(KEYS[0]) for _ in range(4)]
    assert Counter(slot.replica.teacher.name for slot in slots) == {"replica-0:8000": 2, "replica-1:8000": 2}


async def test_an_open_breaker_hands_on_to_the_next():
    pool = await pool_of(2)
    first = await where(pool, KEYS[0])
    (teacher,) = [teacher for teacher in teachers(pool) if teacher.name == first]
    teacher.breaker.failed()
    assert await where(pool, KEYS[0]) == first
    teacher.breaker.failed()
    assert await where(pool, KEYS[0]) != first
    assert not pool.down


async def test_a_breakers_trial_is_one_call():
    clock = [0.0]
    pool = await pool_of(1)
    (teacher,) = teachers(pool)
    teacher.breaker = Breaker(1, 10.0, lambda: clock[0])
    teacher.breaker.failed()
    assert await refusal(pool) == "breaker"
    assert pool.down
    clock[0] = 11.0
    assert not pool.down
    await pool.admit(KEYS[0])
    assert await refusal(pool) == "breaker"


# Who is asked instead


async def test_another_replica_takes_over_before_the_first_token():
    pool = await pool_of(3)
    slot = await pool.admit(KEYS[0])
    slot.replica.teacher.fails_before = 0
    assert await write(pool, slot) == [0, 1, 2]
    assert sorted(teacher.calls for teacher in teachers(pool)) == [0, 1, 1]
    assert len({moment for teacher in teachers(pool) for moment in teacher.started}) == 1, (
        "one deadline for both"
    )
    assert running(pool) == [0, 0, 0]


async def test_a_call_moves_to_another_replica_only_once():
    pool = await pool_of(3)
    for teacher in teachers(pool):
        teacher.fails_before = 0
    with pytest.raises(TeacherError):
        await write(pool, await pool.admit(KEYS[0]))
    assert sum(teacher.calls for teacher in teachers(pool)) == 2
    assert running(pool) == [0, 0, 0]


async def test_streamed_tokens_are_not_written_again():
    pool = await pool_of(2)
    slot = await pool.admit(KEYS[0])
    slot.replica.teacher.fails_before = 1
    pieces, written = pool.write(slot, ASK), []
    with pytest.raises(TeacherError):
        written += [piece.token_ids async for piece in pieces]
    assert sum(teacher.calls for teacher in teachers(pool)) == 1


async def test_a_single_replica_has_nobody_to_take_over():
    pool = await pool_of(1)
    pool.replicas[0].teacher.fails_before = 0
    with pytest.raises(TeacherError):
        await write(pool, await pool.admit(KEYS[0]))
    assert pool.replicas[0].teacher.calls == 1


async def test_no_replica_takes_over_a_request_that_the_teacher_refuses():
    pool = await pool_of(2)
    slot = await pool.admit(KEYS[0])

    async def write_nothing(*_: object, **__: object) -> AsyncIterator[Piece]:
        raise TeacherError("status", "too long", refused=True)
        yield

    slot.replica.teacher.write = write_nothing
    with pytest.raises(TeacherError, match="too long"):
        await write(pool, slot)
    assert sum(teacher.calls for teacher in teachers(pool)) == 0
