"""The number of calls that a pool of replicas takes at once, and the queue of the others."""

import asyncio

import pytest

from server.teacher.errors import TeacherError
from server.teacher.pool import TeacherPool
from tests.helpers.scripted_replicas import KEYS, pool_of, refusal, running

pytestmark = pytest.mark.steady_time


async def call(pool: TeacherPool, number: int, order: list[int]) -> None:
    """Wait for a slot, note the turn, and give the slot back."""
    slot = await pool.admit(KEYS[number])
    order.append(number)
    slot.release()


# How many at once


async def test_a_call_waits_for_its_turn_in_the_order_of_coming():
    pool = await pool_of(1, concurrency=1)
    first, order = await pool.admit(KEYS[0]), []

    tasks = [asyncio.create_task(call(pool, number, order)) for number in range(5)]
    await asyncio.sleep(0.01)
    assert order == []
    first.release()
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3, 4]
    assert running(pool) == [0]


@pytest.mark.parametrize("queue", [0.0, 0.05])
async def test_a_call_that_waits_too_long_is_refused(queue):
    pool = await pool_of(1, concurrency=1, queue=queue)
    slot = await pool.admit(KEYS[0])
    assert await refusal(pool) == "saturated"
    slot.release()
    assert (await pool.admit(KEYS[0])).replica.running == 1


async def test_a_call_that_is_given_up_at_its_turn_passes_the_turn_on():
    pool = await pool_of(1, concurrency=1)
    slot = await pool.admit(KEYS[0])
    leaving, waiting = (asyncio.create_task(pool.admit(key)) for key in KEYS[:2])
    await asyncio.sleep(0)
    slot.release()
    leaving.cancel()
    await asyncio.wait([leaving])
    assert leaving.cancelled()
    await asyncio.wait_for(waiting, 1)
    assert running(pool) == [1]


async def test_calls_never_exceed_the_bound_and_no_place_leaks():
    pool, most = await pool_of(2, concurrency=3, queue=0.02), 0

    async def call(key: bytes) -> bool:
        nonlocal most
        try:
            slot = await pool.admit(key)
        except TeacherError:
            return False
        most = max(most, *running(pool))
        try:
            await asyncio.sleep(0.005)
        finally:
            slot.release()
        return True

    tasks = [asyncio.create_task(call(key)) for key in KEYS]
    for task in tasks[::7]:
        asyncio.get_running_loop().call_later(0.01, task.cancel)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert most == 3
    assert running(pool) == [0, 0]
    assert {True, False} < set(map(lambda o: o if isinstance(o, bool) else None, outcomes))


# A queue at the teacher


async def test_a_new_call_does_not_overtake_waiting_ones():
    pool = await pool_of(1, concurrency=1)
    first, order = await pool.admit(KEYS[0]), []

    waiting = [asyncio.create_task(call(pool, number, order)) for number in range(3)]
    await asyncio.sleep(0)
    first.release()
    newcomer = asyncio.create_task(call(pool, 99, order))
    await asyncio.gather(*waiting, newcomer)
    assert order == [0, 1, 2, 99]


async def test_waiting_calls_learn_at_once_that_all_replicas_are_down():
    pool = await pool_of(1, concurrency=1)
    slot = await pool.admit(KEYS[0])
    waiting = asyncio.create_task(pool.admit(KEYS[1]))
    await asyncio.sleep(0)
    pool.replicas[0].up = False
    slot.release()
    with pytest.raises(TeacherError) as error:
        await waiting
    assert error.value.reason == "breaker"


async def test_a_call_that_moves_on_takes_no_other_calls_place():
    pool = await pool_of(2, concurrency=1)
    slot = await pool.admit(KEYS[0])
    (other,) = [replica for replica in pool.replicas if replica is not slot.replica]
    waiting = asyncio.create_task(pool.admit(KEYS[0]))
    slot.move(other)
    taken = await waiting
    assert running(pool) == [1, 1]
    assert taken.replica is not other
