"""One teacher call, read beside the student's work and taken as far as it is wanted."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from server.completion import Piece
from server.metrics import DROPPED_TOKENS
from server.teacher.pool import Slot

_READING: set[asyncio.Task[None]] = set()  # asyncio itself keeps no task alive


class Call:
    """A call may write more than was reserved for it, in case the student asks again behind a span.

    Such tokens are taken under a reservation of their own, or dropped; the budgets hold what is taken. The
    call is read to its end in any case, so that its connection is used again, and gives back its slot there.
    """

    def __init__(self, pieces: AsyncGenerator[Piece], slot: Slot, tokens: int) -> None:
        """``tokens``: the most that it writes."""
        self.left = tokens
        """Tokens that may still be taken; 0 once it has ended."""
        self._read: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._rest: Piece | None = None
        self._dropped = False
        self._task = asyncio.create_task(self._run(pieces, slot))
        _READING.add(self._task)
        self._task.add_done_callback(_READING.discard)

    async def take(self, tokens: int) -> AsyncIterator[Piece]:
        """The next ``tokens`` tokens as they come, fewer where the call ends.

        Raises:
            TeacherError: as `TeacherPool.write`; pieces handed out before it stay valid.
        """
        while tokens > 0 and self.left > 0:
            read = self._rest or await self._read.get()
            if isinstance(read, Exception):
                self.left = 0
                raise read
            piece, self._rest = read.split(tokens)
            tokens -= len(piece.token_ids)
            self.left = 0 if piece.finish_reason else self.left - len(piece.token_ids)
            yield piece

    def drop(self) -> None:
        """Nothing more of it is wanted."""
        self.left, self._dropped = 0, True
        if self._rest is not None:
            DROPPED_TOKENS.inc(len(self._rest.token_ids))
        while not self._read.empty():
            self._count(self._read.get_nowait())

    async def close(self) -> None:
        """End it now: where the teacher is still writing, it is told to stop."""
        self.drop()
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self, pieces: AsyncGenerator[Piece], slot: Slot) -> None:
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    self._hand(piece)
        except Exception as error:
            self._hand(error)
        finally:
            slot.release()

    def _hand(self, read: Piece | Exception) -> None:
        if self._dropped:
            self._count(read)
        else:
            self._read.put_nowait(read)

    @staticmethod
    def _count(read: Piece | Exception) -> None:
        if isinstance(read, Piece):
            DROPPED_TOKENS.inc(len(read.token_ids))
