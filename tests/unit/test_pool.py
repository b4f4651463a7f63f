"""The teacher's replicas as one teacher, over scripted replicas."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import pytest
from prometheus_client import REGISTRY

from server.completion import Piece
from server.teacher.breaker import Breaker
from server.teacher.client import Ask
from server.teacher.crowding import Crowding
from server.teacher.errors import TeacherError
from server.teacher.pool import Slot, TeacherPool
from server.vllm_api import SamplingParams

pytestmark = pytest.mark.steady_time

KEYS = [n.to_bytes(16) for n in range(300)]
ASK = Ask([1], 3, SamplingParams())
DOWN = TeacherError("unreachable", "the script says so")


class Replica:
    """Writes three tokens, the second of which may never come; what goes wrong is set from outside."""

    def __init__(self, number: int) -> None:
        self.url = f"http://replica-{number}:8000"
        self.name = f"replica-{number}:8000"
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


async def same_vocabulary(teacher: Replica) -> None:
    if teacher.absent:
        raise teacher.absent
    if teacher.vocabulary != "ours":
        raise TeacherError("nonsense", "another vocabulary")


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


async def write(pool: TeacherPool, slot: Slot) -> list[int]:
    try:
        return [token async for piece in pool.write(slot, ASK) for token in piece.token_ids]
    finally:
        slot.release()


def running(pool: TeacherPool) -> list[int]:
    return [replica.running for replica in pool.replicas]


async def refusal(pool: TeacherPool) -> str:
    with pytest.raises(TeacherError) as error:
        await pool.admit(KEYS[0])
    return error.value.reason


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


# How many at once


async def test_a_call_waits_for_its_turn_in_the_order_of_coming():
    pool = await pool_of(1, concurrency=1)
    first, order = await pool.admit(KEYS[0]), []

    async def call(number: int) -> None:
        slot = await pool.admit(KEYS[number])
        order.append(number)
        slot.release()

    tasks = [asyncio.create_task(call(number)) for number in range(5)]
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


async def test_whoever_gives_up_when_it_is_his_turn_passes_it_on():
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


async def test_never_more_than_allowed_and_nothing_leaks():
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


async def test_but_once():
    pool = await pool_of(3)
    for teacher in teachers(pool):
        teacher.fails_before = 0
    with pytest.raises(TeacherError):
        await write(pool, await pool.admit(KEYS[0]))
    assert sum(teacher.calls for teacher in teachers(pool)) == 2
    assert running(pool) == [0, 0, 0]


async def test_what_was_streamed_is_not_written_again():
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


async def test_nobody_takes_over_what_the_teacher_refuses():
    pool = await pool_of(2)
    slot = await pool.admit(KEYS[0])

    async def write_nothing(*_: object, **__: object) -> AsyncIterator[Piece]:
        raise TeacherError("status", "too long", refused=True)
        yield

    slot.replica.teacher.write = write_nothing
    with pytest.raises(TeacherError, match="too long"):
        await write(pool, slot)
    assert sum(teacher.calls for teacher in teachers(pool)) == 0


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


async def test_without_any_there_is_no_start():
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
    assert REGISTRY.get_sample_value("wheels_teacher_up", {"replica": "replica-0:8000"}) == 0
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


async def test_healthy_is_who_has_one_that_answers():
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
    running = ("wheels_teacher_running", {"replica": "replica-0:8000"})
    assert REGISTRY.get_sample_value(*running) == 1
    slot.release()
    assert REGISTRY.get_sample_value(*running) == 0


async def test_who_stays_out_is_not_healthy_and_is_told_of_once(caplog: pytest.LogCaptureFixture):
    pool = await pool_of(1)
    (replica,) = pool.replicas
    replica.teacher.vocabulary = "another"
    pool._check_vocabulary = same_vocabulary
    replica.up = replica.checked = False
    for _ in range(3):
        await pool._probe(replica)
    assert await replica.teacher.healthy()
    assert not await pool.healthy()
    assert caplog.text.count("a replica of the teacher stays out: another vocabulary") == 1
    replica.teacher.vocabulary = "ours"
    await pool._probe(replica)
    assert await pool.healthy()


# A queue at the teacher


async def test_a_newcomer_does_not_overtake_who_waits():
    pool = await pool_of(1, concurrency=1)
    first, order = await pool.admit(KEYS[0]), []

    async def call(number: int) -> None:
        slot = await pool.admit(KEYS[number])
        order.append(number)
        slot.release()

    waiting = [asyncio.create_task(call(number)) for number in range(3)]
    await asyncio.sleep(0)
    first.release()
    newcomer = asyncio.create_task(call(99))
    await asyncio.gather(*waiting, newcomer)
    assert order == [0, 1, 2, 99]


async def test_who_waits_hears_at_once_that_all_are_down():
    pool = await pool_of(1, concurrency=1)
    slot = await pool.admit(KEYS[0])
    waiting = asyncio.create_task(pool.admit(KEYS[1]))
    await asyncio.sleep(0)
    pool.replicas[0].up = False
    slot.release()
    with pytest.raises(TeacherError) as error:
        await waiting
    assert error.value.reason == "breaker"


async def test_a_call_that_moves_on_takes_nobodys_place():
    pool = await pool_of(2, concurrency=1)
    slot = await pool.admit(KEYS[0])
    (other,) = [replica for replica in pool.replicas if replica is not slot.replica]
    waiting = asyncio.create_task(pool.admit(KEYS[0]))
    slot.move(other)
    taken = await waiting
    assert running(pool) == [1, 1]
    assert taken.replica is not other


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_queue_halves_the_bound_once_for_all_calls_in_it():
    clock = Clock()
    crowding = Crowding(1024, clock)
    clock.now = 10.0
    for running_now in range(200, 150, -1):
        crowding.gave_up(running_now, waited=10.0)
    assert crowding.limit == 100
    clock.now = 21.0
    crowding.first_token(100, waited=6.0, longest=10.0)
    assert crowding.limit == 50


def test_quick_first_tokens_raise_the_bound_again_up_to_its_most():
    crowding = Crowding(8)
    crowding.gave_up(4, waited=1.0)
    limits = []
    for _ in range(8):
        crowding.first_token(1, waited=0.1, longest=10.0)
        limits.append(crowding.limit)
    assert limits == [3, 4, 5, 6, 7, 8, 8, 8]


def test_a_bound_leaves_one_call():
    crowding = Crowding(4)
    crowding.gave_up(1, waited=1.0)
    assert crowding.limit == 1


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


async def test_a_slow_replica_does_not_delay_whether_one_is_ready():
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
