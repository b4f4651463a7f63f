"""The state of a choice's teachers: what each may still write, and when it may be asked again."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from router.budget import Bucket
from router.policy import Terms
from server.choice import Choice
from server.metrics import ESCALATIONS
from server.shared_budgets import Share
from server.teacher.errors import TeacherError
from server.teacher.teachers import NamedTeacher
from server.teacher.view import TeacherView

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


class Written(NamedTuple):
    """Tokens of a completion, or of a stretch of it."""

    teacher_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Standings:
    """A choice with all the teachers that it may ask."""

    choice: Choice
    each: Sequence[Standing]
    """Tools, then from the cheapest to the dearest."""
    share: Share
    """The choice's part in the budgets that requests share."""
    ranked: Sequence[Standing] = ()
    """Those that the terms of the last segment were made for, by price."""
    told: Written = field(default_factory=Written)
    """What `news` has told so far."""

    @classmethod
    def of(cls, choice: Choice, teachers: Sequence[NamedTeacher], share: Share) -> "Standings":
        """Before anybody was asked."""
        own = choice.purse.own
        each = [Standing(teacher, teacher.view(choice), own.get(teacher.name)) for teacher in teachers]
        return cls(choice, each, share)

    @property
    def may_ask(self) -> bool:
        """Whether there is a teacher that the choice may ask, now or later."""
        return any(standing.may_ask for standing in self.each)

    @property
    def pause(self) -> int:
        """Tokens to write before the choice may ask again."""
        ask_from = [standing.ask_from for standing in self.each if standing.may_ask]
        return max(0, min(ask_from, default=0) - len(self.choice.completion))

    @property
    def models(self) -> Sequence[Standing]:
        """The teachers that are models; the tools, if there are no models."""
        models = [standing for standing in self.each if not standing.teacher.is_tool]
        return models or self.each

    @property
    def losses(self) -> int:
        """How often all teachers were lost since one last wrote something."""
        return min((standing.losses for standing in self.models), default=0)

    @property
    def lost(self) -> bool:
        """Whether all that may be asked are down."""
        return all(standing.teacher.pool.down for standing in self.each if standing.may_ask)

    @property
    def reads(self) -> int:
        """The most tokens that a teacher would read now."""
        return max((standing.view.reads for standing in self.each), default=0)

    def order(self, level: int, terms: Terms) -> list[Standing]:
        """Whom to ask, one after the other.

        Tools come first. Of the models that the terms were made for, the first is the one that the ``level``
        of the row means, or the dearest if they are to ask always. Then come dearer ones, then cheaper ones.
        """
        tools = [standing for standing in self.each if standing.teacher.is_tool]
        place = self._place(level, terms)
        ranked = [*self.ranked[place:], *reversed(self.ranked[:place])]
        others = [standing for standing in self.each if standing not in (*tools, *ranked)]
        length = len(self.choice.completion)
        order = [*tools, *(standing for standing in ranked if standing not in tools), *others]
        return [standing for standing in order if standing.may_ask and standing.ask_from <= length]

    def _place(self, level: int, terms: Terms) -> int:
        """The place in `ranked` of who is meant."""
        last = max(0, len(self.ranked) - 1)
        if terms.always:
            return last
        if not terms.least:
            return min(last, level)
        names = [standing.name for standing in self.ranked]
        name = terms.least[min(level, len(terms.least) - 1)].teacher  # of another router, just before
        return names.index(name) if name in names else 0

    def news(self) -> Written:
        """What was written since the last call."""
        before = self.told
        self.told = Written(self.choice.report.tokens, len(self.choice.completion))
        return Written(
            self.told.teacher_tokens - before.teacher_tokens,
            self.told.completion_tokens - before.completion_tokens,
        )

    def wait(self, tokens: int) -> None:
        """The student writes this many tokens before the choice may ask again."""
        for standing in self.each:
            standing.wait(len(self.choice.completion) + tokens)

    def ask_no_more(self) -> None:
        """The student writes the rest alone."""
        for standing in self.each:
            standing.may_ask = False

    def denied(self, refusals: Sequence[Refusal]) -> None:
        """The student goes on alone, for these reasons."""
        report = self.choice.report
        for reason in dict.fromkeys(refusal.reason for refusal in refusals if refusal.reason):
            report.denied[reason] += 1
            ESCALATIONS.labels("denied", reason).inc()
        report.degraded |= any(refusal.degraded for refusal in refusals)
