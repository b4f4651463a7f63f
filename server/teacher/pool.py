"""The teacher's replicas as one teacher: which to call, how many calls at once, which one to try next."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

from server.completion import Piece
from server.metrics import TEACHER_RUNNING, TEACHER_UP
from server.teacher.ask import Ask
from server.teacher.client import Teacher
from server.teacher.crowding import Crowding
from server.teacher.errors import TeacherError

logger = logging.getLogger(__name__)

ABSENT = ("unreachable", "timeout")
"""Failures that keep a replica out until it answers; its operator has to fix any other failure."""


class VocabularyCheck(Protocol):
    """Compares the vocabulary of a server with the student's; `server.teacher.vocabulary` has it."""

    async def __call__(self, teacher: Teacher) -> None:
        """Raises TeacherError if the vocabularies differ."""


class Replica:
    """One server of the teacher, with what the gateway knows of it."""

    def __init__(self, teacher: Teacher, concurrency: int) -> None:
        self.teacher = teacher
        self.crowding = Crowding(concurrency)
        self.running = 0
        self.up = False
        """Whether the replica counts as reachable, by its answers at the start and to later probes."""
        self.late = False
        """Whether the last probe had no answer in time: a busy server may miss one."""
        self.checked = False
        """Whether the replica is known to serve the right model with the right vocabulary."""
        self.out_for = ""
        """Why the replica is not used although it answers; logged once. Empty if there is no such reason."""
        TEACHER_RUNNING.labels(teacher.of, teacher.name).set_function(lambda: self.running)
        TEACHER_UP.labels(teacher.of, teacher.name).set_function(lambda: self.up)

    @property
    def down(self) -> bool:
        """Whether the replica may not be asked now."""
        return not self.up or self.teacher.breaker.open


class Slot:
    """The right to one call, at one replica at a time; to be released exactly once."""

    def __init__(self, pool: "TeacherPool", replica: Replica) -> None:
        self._pool = pool
        self.replica = replica
        replica.running += 1

    def release(self) -> None:
        """Give the right back."""
        self.replica.running -= 1
        self._pool.wake()

    def move(self, replica: Replica) -> None:
        """Exchange the right for one at another replica."""
        replica.running += 1
        self.release()
        self.replica = replica


@dataclass(eq=False)
class _Waiting:
    """A call that waits for its turn."""

    ranked: list[Replica]
    slot: asyncio.Future[Slot]


class TeacherPool:
    """Replicas of one teacher: each call goes to one that is up and has room.

    A key has its own order of preference among the replicas (rendezvous hashing: Thaler and Ravishankar,
    1998). So the spans of a request find its prefix in the cache of the replica that wrote the last one. A
    replica that leaves or comes moves only its own share of keys.
    """

    def __init__(self, teachers: Sequence[Teacher], *, concurrency: int, queue_seconds: float) -> None:
        """``concurrency``: most calls at once for each replica; ``queue_seconds``: longest wait of a call."""
        self.replicas = [Replica(teacher, concurrency) for teacher in teachers]
        self._queue_seconds = queue_seconds
        self._waiting: deque[_Waiting] = deque()
        self._check_vocabulary: VocabularyCheck | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "TeacherPool":
        for replica in self.replicas:
            await self._stack.enter_async_context(replica.teacher)
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()

    def __str__(self) -> str:
        models: set[str] = set()
        names: list[str] = []
        for replica in self.replicas:
            names.append(replica.teacher.name)
            if replica.checked:
                models.add(str(replica.teacher.model))
        return f"{', '.join(sorted(models))} at {', '.join(names)}"

    @property
    def max_model_len(self) -> int | None:
        """The shortest context of all replicas, in tokens; None if no replica reports it."""
        lengths = [replica.teacher.max_model_len for replica in self.replicas]
        return min((length for length in lengths if length is not None), default=None)

    @property
    def down(self) -> bool:
        """Whether no replica may be asked now."""
        return all(replica.down for replica in self.replicas)

    async def connect(self) -> None:
        """Find the replicas that are up; others join when they answer a probe.

        Raises:
            TeacherError: no replica is up, or one serves another model.
        """
        await self._introduce(self.replicas)

    async def check_vocabulary(self, check: VocabularyCheck) -> None:
        """Check every replica that is up; others are checked before they are asked for anything.

        Raises:
            TeacherError: a replica has a different vocabulary from the student.
        """
        self._check_vocabulary = check
        await self._introduce([replica for replica in self.replicas if replica.up])

    async def _introduce(self, replicas: Sequence[Replica]) -> None:
        outcomes = await asyncio.gather(*map(self._check, replicas), return_exceptions=True)
        errors = [error for error in outcomes if error is not None]
        for error in errors:
            absent = isinstance(error, TeacherError) and error.reason in ABSENT
            if not absent or len(errors) == len(replicas):
                raise error
        for error in errors:
            logger.warning("a replica of the teacher is not reachable: %s", error)

    async def _check(self, replica: Replica) -> None:
        replica.up = replica.checked = replica.late = False
        await replica.teacher.connect()
        if self._check_vocabulary is not None:
            await self._check_vocabulary(replica.teacher)
        replica.up = replica.checked = True

    async def healthy(self) -> bool:
        """Whether any replica that may be asked answers its health check now."""
        asked = [
            asyncio.create_task(replica.teacher.healthy()) for replica in self.replicas if replica.checked
        ]
        try:
            for answer in asyncio.as_completed(asked):
                if await answer:
                    return True
            return False
        finally:
            for task in asked:
                task.cancel()

    async def watch(self, seconds: float) -> None:
        """Probe every replica, forever and separately, so that a slow one delays no other."""
        await asyncio.gather(*(self._watch(replica, seconds) for replica in self.replicas))

    async def _watch(self, replica: Replica, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await self._probe(replica)
            except Exception:
                logger.exception("a probe of the teacher at %s failed", replica.teacher.name)

    async def _probe(self, replica: Replica) -> None:
        was_up = replica.up
        if replica.checked:
            answer = await replica.teacher.healthy()
            late_before = replica.late
            replica.late = answer is None
            if answer is None and not late_before:
                return
            # A server that comes back may be another one, so it is checked again.
            replica.up = replica.checked = bool(answer)
        else:
            await self._probe_unknown(replica)
        if replica.up != was_up:
            state = "up" if replica.up else "down"
            logger.warning("the teacher at %s is %s", replica.teacher.name, state)
            self.wake()

    async def _probe_unknown(self, replica: Replica) -> None:
        try:
            await self._check(replica)
        except TeacherError as error:
            before = replica.out_for
            replica.out_for = "" if error.reason in ABSENT else str(error)
            if replica.out_for not in ("", before):
                logger.error("a replica of the teacher is not used: %s", error)

    async def ask(self, key: bytes, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """As `Teacher.ask`, at the first replica in the key's order that is up and answers.

        Raises:
            TeacherError: all replicas are down ("breaker"); else as `Teacher.ask`.
        """
        problem = TeacherError("breaker", "every replica of the teacher is marked as down")
        for replica in self._ranked(key):
            if replica.down:
                continue
            try:
                return await replica.teacher.ask(path, body)
            except TeacherError as error:
                if error.refused:
                    raise
                problem = error
        raise problem

    async def admit(self, key: bytes) -> Slot:
        """The right to a call at the first replica in the key's order that is up and has room.

        Calls that have to wait get it in the order of their arrival.

        Raises:
            TeacherError: all replicas are down ("breaker"), or none had room in time ("saturated").
        """
        waiting = _Waiting(self._ranked(key), asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self.wake()
        try:
            async with asyncio.timeout(self._queue_seconds):
                return await waiting.slot
        except TimeoutError:
            waited = f"for {self._queue_seconds} s every replica of the teacher was busy"
            self._leave(waiting)
            raise TeacherError("saturated", waited, well=True) from None
        except asyncio.CancelledError:
            self._leave(waiting)
            raise

    def _leave(self, waiting: _Waiting) -> None:
        """Stop waiting; a slot that came at the last moment goes to the next call."""
        if waiting in self._waiting:
            self._waiting.remove(waiting)
        elif waiting.slot.done() and not waiting.slot.cancelled() and not waiting.slot.exception():
            waiting.slot.result().release()

    def wake(self) -> None:
        """Give free slots to the calls that have waited longest."""
        while self._waiting:
            first = self._waiting[0]
            if first.slot.done():  # cancelled
                self._waiting.popleft()
            elif (replica := self._free(first.ranked)) is not None:
                self._waiting.popleft()
                first.slot.set_result(Slot(self, replica))
            elif self.down:
                self._waiting.popleft()
                message = "every replica of the teacher is marked as down"
                first.slot.set_exception(TeacherError("breaker", message))
            else:
                return

    async def write(
        self, slot: Slot, ask: Ask, *, started: float | None = None, **options: Any
    ) -> AsyncGenerator[Piece]:
        """As `Teacher.write`; if the replica fails before its first token, another one is asked, once.

        Raises:
            TeacherError: as `Teacher.write`.
        """
        if started is None:
            started = time.monotonic()
        moved = False
        while True:
            written = False
            try:
                async with aclosing(self._observed(slot, ask, started=started, **options)) as pieces:
                    async for piece in pieces:
                        written = True
                        yield piece
                return
            except TeacherError as error:
                if written or moved or error.refused:
                    raise
                if not ask.meter.admits(len(ask.prompt_ids), ask.tokens):
                    raise
                other = self._free([replica for replica in self.replicas if replica is not slot.replica])
                if other is None:
                    raise
                logger.warning("asking another replica of the teacher: %s", error)
                slot.move(other)
                moved = True

    async def _observed(self, slot: Slot, ask: Ask, **options: Any) -> AsyncGenerator[Piece]:
        """A call at the slot's replica; its first token adjusts the replica's limit of calls."""
        replica = slot.replica
        sent = time.monotonic()
        first = True
        try:
            async with aclosing(replica.teacher.write(ask, **options)) as pieces:
                async for piece in pieces:
                    if first:
                        longest = replica.teacher.first_wait(len(ask.prompt_ids))
                        replica.crowding.first_token(replica.running, time.monotonic() - sent, longest)
                        first = False
                    yield piece
        except TeacherError as error:
            if first and error.well and error.reason in ("timeout", "saturated"):
                replica.crowding.gave_up(replica.running, time.monotonic() - sent)
            raise

    def _ranked(self, key: bytes) -> list[Replica]:
        if len(self.replicas) == 1:
            return self.replicas

        def weight(replica: Replica) -> bytes:
            return blake2b(replica.teacher.url.encode(), key=key[:64], digest_size=8).digest()

        return sorted(self.replicas, key=weight)

    @staticmethod
    def _free(replicas: Sequence[Replica]) -> Replica | None:
        """The first replica that may be called now, or None. After an open breaker, the call is its trial."""
        for replica in replicas:
            if not replica.up or replica.running >= replica.crowding.limit:
                continue
            if replica.teacher.breaker.allow():
                return replica
        return None
