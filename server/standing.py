"""How a choice stands with one of its teachers: what it may still have, and when it may ask again."""

from dataclasses import dataclass

from router.budget import Bucket
from server.teacher.errors import TeacherError
from server.teacher.teachers import NamedTeacher
from server.teacher_view import TeacherView

PAUSE_TOKENS = 32
"""After a refused span, a choice does not ask again for this many tokens."""


@dataclass
class Standing:
    """One teacher that a choice may ask."""

    teacher: NamedTeacher
    view: TeacherView
    bucket: Bucket | None = None
    """What the request gives this teacher alone, next to what it gives all."""
    may_ask: bool = True
    ask_from: int = 0
    """Length of the completion from which it may be asked again."""
    losses: int = 0
    """How often it was lost since it last wrote something."""

    @property
    def name(self) -> str:
        """The teacher's."""
        return self.teacher.name

    def can_be_asked(self, length: int) -> bool:
        """Whether there is any use in asking now, after ``length`` tokens of the completion."""
        return self.may_ask and self.ask_from <= length and not self.teacher.pool.down

    def follow_budget(self, length: int, completion: int) -> None:
        """Wait until its own budget has room.

        Args:
            length: tokens that budgets are a fraction of.
            completion: tokens of the completion.
        """
        if self.bucket is None:
            return
        earliest = self.bucket.earliest(self.view.reads)
        if earliest is None:
            self.may_ask = False
        else:
            self.ask_from = max(self.ask_from, completion + earliest - length)

    def wait(self, length: int) -> None:
        """It is not asked before the completion has this length."""
        self.ask_from = max(self.ask_from, length)

    def lose(self, length: int) -> None:
        """It is left alone, twice as long each time: a teacher that stays away costs little."""
        self.ask_from = length + PAUSE_TOKENS * (1 << self.losses)
        self.losses += 1


@dataclass(frozen=True)
class Refusal:
    """Why a teacher does not write a span."""

    reason: str
    degraded: bool = False
    error: TeacherError | None = None
    """The teacher was lost by this."""
    for_all: bool = False
    """No other teacher would write it either."""


UNNOTICED = Refusal("")
"""Nobody has to know: the choice asks again soon."""
