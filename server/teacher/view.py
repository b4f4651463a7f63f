"""A choice as the teacher sees it: its prompt, and how its reply becomes the student's tokens."""

from collections.abc import AsyncGenerator
from typing import Protocol

from server.choice import Choice
from server.completion import Piece
from server.teacher.ask import Ask, SpelledIds
from server.teacher.meter import Meter
from server.teacher.pool import Slot, TeacherPool


class TeacherView(Protocol):
    """A choice as the teacher sees it. The span loop knows the student's tokens only."""

    @property
    def half_written(self) -> bool:
        """Whether the student has to finish a character before the teacher can read the completion."""

    @property
    def reads(self) -> int:
        """Number of its own tokens that the teacher reads in a call; exact for the next call after `room`."""

    @property
    def stuck(self) -> bool:
        """Whether the last call ended at a character that the student has no tokens for."""

    async def room(self) -> int | None:
        """Tokens that the teacher's context has left; None if its context is unknown. Raises TeacherError."""

    def write(self, slot: Slot, tokens: int, deadline: float, meter: Meter) -> AsyncGenerator[Piece, None]:
        """Let the teacher write at most this many of the student's tokens; as `TeacherPool.write`."""


class SameTokens:
    """A choice as a teacher with the student's vocabulary sees it: both read and write the same ids."""

    half_written = False
    stuck = False

    def __init__(self, teacher: TeacherPool, choice: Choice) -> None:
        self._teacher = teacher
        self._choice = choice
        self._spelled = SpelledIds()

    @property
    def reads(self) -> int:
        """Number of tokens of prompt and completion."""
        return self._choice.prefix_tokens

    async def room(self) -> int | None:
        """Tokens that the teacher's context has left after prompt and completion."""
        context = self._teacher.max_model_len
        return None if context is None else context - self.reads

    def write(self, slot: Slot, tokens: int, deadline: float, meter: Meter) -> AsyncGenerator[Piece, None]:
        """Let the teacher continue prompt and completion."""
        choice = self._choice
        ask = Ask(
            choice.prefix,
            tokens,
            choice.params,
            written=len(choice.completion),
            min_tokens=choice.min_tokens,
            seed=choice.seed,
            end_ids=choice.end_ids,
            cache_salt=choice.prompt.get("cache_salt"),
            meter=meter,
            constraint=choice.constraint,
            adapter=choice.adapter,
            spelled=self._spelled,
        )
        return self._teacher.write(slot, ask, request_id=choice.call_id, deadline=deadline)
