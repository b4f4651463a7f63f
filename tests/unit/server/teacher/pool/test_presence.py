"""The presence of the teacher's replicas, and the probes that find it out."""

import asyncio

import pytest
from prometheus_client import REGISTRY

from server.teacher.errors import TeacherError
from server.teacher.pool import TeacherPool
from tests.helpers.scripted_replicas import DOWN, KEYS, Replica, pool_of, refusal, teachers, where

pytestmark = pytest.mark.steady_time


async def same_vocabulary(teacher: Replica) -> None:
    if teacher.absent:
        raise teacher.absent
    if teacher.vocabulary != "ours":
        raise TeacherError("nonsense", "another vocabulary")


# Who is there


def absent(pool: TeacherPool, *numbers: int, error: TeacherError = DOWN) -> TeacherPool:
    for number in numbers:
        pool.replicas[number].teacher.absent = error
    return pool


def unconnected(count: int) -> TeacherPool:
    return TeacherPool([Replica(n) for n in range(count)], concurrency=8, queue_seconds=0.1)


async def test_one_replica_is_enough_to_start_and_others_join_when_they_answer():
    pool = absent(unconnected(2), 0)
    await pool.connect()
    await pool.check_vocabulary(same_vocabulary)
    assert {await where(pool, key) for key in KEYS} == {"replica-1:8000"}
    absent(pool, 0, error=None)
    await pool._probe(pool.replicas[0])
    assert {await where(pool, key) for key in KEYS} == {"replica-0:8000", "replica-1:8000"}


async def test_without_any_replica_the_gateway_does_not_start():
    pool = absent(unconnected(2), 0, 1)
    with pytest.raises(TeacherError, match="the script says so"):
        await pool.connect()
    assert await refusal(pool) == "breaker"


async def test_a_replica_of_another_model_stops_the_start():
    pool = absent(unconnected(2), 1, error=TeacherError("status", "serves small, not 'big'"))
    with pytest.raises(TeacherError, match="serves small"):
        await pool.connect()


async def test_a_replica_that_comes_late_with_another_vocabulary_stays_out(caplog):
    pool = absent(unconnected(2), 0)
    await pool.connect()
    await pool.check_vocabulary(same_vocabulary)
    absent(pool, 0, error=None).replicas[0].teacher.vocabulary = "another"
    await pool._probe(pool.replicas[0])
    assert not pool.replicas[0].up
    assert "another vocabulary" in caplog.text


async def test_a_replica_that_comes_back_with_another_vocabulary_stays_out(caplog):
    pool = await pool_of(2)
    await pool.check_vocabulary(same_vocabulary)
    await absent(pool, 0)._probe(pool.replicas[0])
    absent(pool, 0, error=None).replicas[0].teacher.vocabulary = "another"
    await pool._probe(pool.replicas[0])
    assert not pool.replicas[0].up
    assert "another vocabulary" in caplog.text
    pool.replicas[0].teacher.vocabulary = "ours"
    await pool._probe(pool.replicas[0])
    assert pool.replicas[0].up


async def test_a_probe_finds_a_dead_replica_before_a_request_does():
    pool = await pool_of(2)
    absent(pool, 0)
    watching = asyncio.create_task(pool.watch(0.01))
    await asyncio.sleep(0.05)
    assert [replica.up for replica in pool.replicas] == [False, True]
    assert REGISTRY.get_sample_value("wheels_teacher_up", {"teacher": "", "replica": "replica-0:8000"}) == 0
    absent(pool, 0, error=None)
    await asyncio.sleep(0.05)
    assert [replica.up for replica in pool.replicas] == [True, True]
    watching.cancel()


async def test_a_busy_replica_may_miss_one_probe_but_not_two():
    pool = await pool_of(1)
    (replica,) = pool.replicas
    up = []
    for silent in (True, False, True, True, False, True):
        replica.teacher.silent = silent
        await pool._probe(replica)
        up.append(replica.up)
    assert up == [True, True, True, False, True, True]


async def test_a_pool_with_one_replica_that_answers_is_healthy():
    pool = await pool_of(2)
    assert await absent(pool, 0).healthy()
    assert not await absent(pool, 1).healthy()


async def test_the_shortest_context_counts():
    pool = await pool_of(3)
    assert pool.max_model_len is None
    pool.replicas[0].teacher.max_model_len, pool.replicas[2].teacher.max_model_len = 512, 256
    assert pool.max_model_len == 256


async def test_calls_under_way_are_counted_by_replica():
    pool = await pool_of(1)
    slot = await pool.admit(KEYS[0])
    running = ("wheels_teacher_running", {"teacher": "", "replica": "replica-0:8000"})
    assert REGISTRY.get_sample_value(*running) == 1
    slot.release()
    assert REGISTRY.get_sample_value(*running) == 0


async def test_a_replica_that_stays_out_is_unhealthy_and_logged_once(caplog: pytest.LogCaptureFixture):
    pool = await pool_of(1)
    (replica,) = pool.replicas
    replica.teacher.vocabulary = "another"
    pool._check_vocabulary = same_vocabulary
    replica.up = replica.checked = False
    for _ in range(3):
        await pool._probe(replica)
    assert await replica.teacher.healthy()
    assert not await pool.healthy()
    assert caplog.text.count("a replica of the teacher is not used: another vocabulary") == 1
    replica.teacher.vocabulary = "ours"
    await pool._probe(replica)
    assert await pool.healthy()


# Probes


async def test_a_slow_replica_delays_no_probe_of_another():
    pool = await pool_of(2)
    slow, quick = teachers(pool)
    probed, asked = asyncio.Event(), asyncio.Event()

    async def hangs() -> bool:
        asked.set()
        await asyncio.Event().wait()
        return True

    async def answers() -> bool:
        await asked.wait()
        probed.set()
        return False

    slow.healthy, quick.healthy = hangs, answers
    watching = asyncio.create_task(pool.watch(0.001))
    await asyncio.wait_for(probed.wait(), 5)
    assert await asyncio.wait_for(pool.admit(KEYS[0]), 5)
    watching.cancel()


async def test_a_slow_replica_does_not_delay_the_check_for_readiness():
    pool = await pool_of(2)

    async def hangs() -> bool:
        await asyncio.Event().wait()
        return True

    pool.replicas[0].teacher.healthy = hangs
    assert await asyncio.wait_for(pool.healthy(), 5)


async def test_a_probe_that_fails_in_an_unknown_way_ends_no_watch(caplog):
    pool = await pool_of(1)
    (teacher,) = teachers(pool)
    again = asyncio.Event()

    async def broken() -> bool:
        if caplog.records:
            again.set()
        raise RuntimeError("never thought of")

    teacher.healthy = broken
    watching = asyncio.create_task(pool.watch(0.001))
    await asyncio.wait_for(again.wait(), 5)
    assert "a probe of the teacher at replica-0:8000 failed" in caplog.text
    watching.cancel()
