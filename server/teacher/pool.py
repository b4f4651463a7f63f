"""The teacher's replicas as one teacher: whom to ask, how many at once, whom instead."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from hashlib import blake2b
from typing import Any

from server.completion import Piece
from server.metrics import TEACHER_RUNNING, TEACHER_UP
from server.teacher.client import Teacher, TeacherError
from server.vllm_api import SamplingParams

logger = logging.getLogger(__name__)

# What keeps a replica out until it answers, as against what its operator has to change.
ABSENT = ("unreachable", "timeout")


class Replica:
    """One server of the teacher, with what the gateway knows of it."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.running = 0
        self.up = False
        """Whether it counts as there, by what it said at the start and to the probes since."""
        self.late = False
        """Whether the last probe had no answer in time: a busy server may miss one."""
        self.checked = False
        """Whether it is known to serve the right model with the right vocabulary."""
        self.out_for = ""
        """Why it is there and stays out, where it does; said once."""
        TEACHER_RUNNING.labels(teacher.name).set_function(lambda: self.running)
        TEACHER_UP.labels(teacher.name).set_function(lambda: self.up)

    @property
    def down(self) -> bool:
        return not self.up or self.teacher.breaker.open


class Slot:
    """The right to one call, at one replica at a time; to be released exactly once."""

    def __init__(self, pool: "TeacherPool", replica: Replica) -> None:
        self._pool = pool
        self.replica = replica
        replica.running += 1

    def release(self) -> None:
        self.replica.running -= 1
        self._pool.wake()

    def move(self, replica: Replica) -> None:
        self.release()
        self.replica = replica
        replica.running += 1


class TeacherPool:
    """Teachers with one vocabulary, of which each call goes to one that is up and has room.

    A key has its own order of preference among the replicas (rendezvous hashing: Thaler and Ravishankar,
    1998), so the spans of a request find its prefix in the cache of the replica that wrote the last one, and
    a replica that leaves or comes moves only its own share of keys.
    """

    def __init__(self, teachers: Sequence[Teacher], *, concurrency: int, queue_seconds: float) -> None:
        """``concurrency``: calls at once for each replica; ``queue_seconds``: longest wait for one's turn."""
        self.replicas = [Replica(teacher) for teacher in teachers]
        self._concurrency = concurrency
        self._queue_seconds = queue_seconds
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._probes: tuple[Sequence[str], Sequence[list[int]]] = ((), ())
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "TeacherPool":
        for replica in self.replicas:
            await self._stack.enter_async_context(replica.teacher)
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()

    def __str__(self) -> str:
        models = {replica.teacher.model for replica in self.replicas if replica.checked}
        return f"{', '.join(sorted(models))} at {', '.join(r.teacher.url for r in self.replicas)}"

    @property
    def max_model_len(self) -> int | None:
        """The shortest context of all replicas, in tokens; None where none tells."""
        return min((n for r in self.replicas if (n := r.teacher.max_model_len) is not None), default=None)

    @property
    def down(self) -> bool:
        """Whether no replica would be asked now."""
        return all(replica.down for replica in self.replicas)

    async def connect(self) -> None:
        """Find out who is there; later ones join when they answer a probe.

        Raises:
            TeacherError: nobody is there, or one serves another model.
        """
        await self._introduce(self.replicas)

    async def check_vocabulary(self, texts: Sequence[str], expected: Sequence[list[int]]) -> None:
        """Raises TeacherError where a replica's tokenizer splits a probe text in another way.

        Replicas that come later are checked before they are asked for anything.
        """
        self._probes = (texts, expected)
        await self._introduce([replica for replica in self.replicas if replica.up])

    async def _introduce(self, replicas: Sequence[Replica]) -> None:
        outcomes = await asyncio.gather(*map(self._check, replicas), return_exceptions=True)
        errors = [error for error in outcomes if error is not None]
        for error in errors:
            if (
                len(errors) == len(replicas)
                or not isinstance(error, TeacherError)
                or error.reason not in ABSENT
            ):
                raise error
        for error in errors:
            logger.warning("a replica of the teacher is missing: %s", error)

    async def _check(self, replica: Replica) -> None:
        replica.up = replica.checked = replica.late = False
        await replica.teacher.connect()
        await replica.teacher.check_vocabulary(*self._probes)
        replica.up = replica.checked = True

    async def healthy(self) -> bool:
        """Whether a replica that may be asked answers its health check now."""
        asked = [replica.teacher for replica in self.replicas if replica.checked]
        return any(await asyncio.gather(*(teacher.healthy() for teacher in asked)))

    async def watch(self, seconds: float) -> None:
        """Probe every replica, for ever."""
        while True:
            await asyncio.sleep(seconds)
            await asyncio.gather(*map(self._probe, self.replicas))

    async def _probe(self, replica: Replica) -> None:
        was_up = replica.up
        if not replica.checked:
            try:
                await self._check(replica)
            except TeacherError as error:
                before, replica.out_for = replica.out_for, "" if error.reason in ABSENT else str(error)
                if replica.out_for not in ("", before):
                    logger.error("a replica of the teacher stays out: %s", error)
        else:
            answer = await replica.teacher.healthy()
            once, replica.late = replica.late, answer is None
            if answer is None and not once:
                return
            # Who comes back may be another: it is checked again.
            replica.up = replica.checked = bool(answer)
        if replica.up != was_up:
            logger.warning("the teacher at %s is %s", replica.teacher.url, "up" if replica.up else "down")
            self.wake()

    async def admit(self, key: bytes) -> Slot:
        """The right to a call at the first replica in the key's order that is up and has room.

        Raises:
            TeacherError: "breaker", all are down; "saturated", none had room in time.
        """
        ranked = self._ranked(key)
        try:
            async with asyncio.timeout(self._queue_seconds):
                while (replica := self._free(ranked)) is None:
                    if self.down:
                        raise TeacherError("breaker", "every replica of the teacher counts as down")
                    await self._turn()
        except TimeoutError:
            waited = f"for {self._queue_seconds} s every replica of the teacher was busy"
            raise TeacherError("saturated", waited) from None
        return Slot(self, replica)

    async def write(
        self, slot: Slot, prompt_ids: list[int], tokens: int, params: SamplingParams, **options: Any
    ) -> AsyncIterator[Piece]:
        """As `Teacher.write`; where a replica fails before its first token, another is asked, once."""
        started, moved = time.monotonic(), False
        while True:
            written = False
            call = slot.replica.teacher.write(prompt_ids, tokens, params, started=started, **options)
            try:
                async with aclosing(call) as pieces:
                    async for piece in pieces:
                        written = True
                        yield piece
                return
            except TeacherError as error:
                others = [replica for replica in self.replicas if replica is not slot.replica]
                if written or moved or error.refused or (other := self._free(others)) is None:
                    raise
                logger.warning("asking another replica of the teacher: %s", error)
                slot.move(other)
                moved = True

    def _ranked(self, key: bytes) -> list[Replica]:
        if len(self.replicas) == 1:
            return self.replicas

        def weight(replica: Replica) -> bytes:
            return blake2b(replica.teacher.url.encode(), key=key[:64], digest_size=8).digest()

        return sorted(self.replicas, key=weight)

    def _free(self, replicas: Sequence[Replica]) -> Replica | None:
        """The first that may be called now; where it was down for a while, this is its trial."""
        for replica in replicas:
            if replica.up and replica.running < self._concurrency and replica.teacher.breaker.allow():
                return replica
        return None

    async def _turn(self) -> None:
        """Wait until a call may have ended; in the order of coming."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # woken and leaving at once: the next one's turn
                self.wake()
            raise

    def wake(self) -> None:
        """Let the first who waits look again."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                return turn.set_result(None)
