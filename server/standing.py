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
    """Budget of the request for this teacher alone, in addition to the one for all; None without one."""
    may_ask: bool = True
    ask_from: int = 0
    """Length of the completion, in tokens, from which the teacher may be asked again."""
    losses: int = 0
    """How often the teacher was lost since it last wrote something."""

    @property
    def name(self) -> str:
        """Name of the teacher."""
        return self.teacher.name

    def can_be_asked(self, length: int) -> bool:
        """Whether the teacher may be asked now, after ``length`` tokens of the completion, and is up."""
        return self.may_ask and self.ask_from <= length and not self.teacher.pool.down

    def follow_budget(self, length: int, completion: int) -> None:
        """Do not ask the teacher before its own budget has room.

        Args:
            length: number of tokens that the request's budgets count.
            completion: number of tokens of the completion.
        """
        if self.bucket is None:
            return
        earliest = self.bucket.earliest(self.view.reads)
        if earliest is None:
            self.may_ask = False
        else:
            self.ask_from = max(self.ask_from, completion + earliest - length)

    def wait(self, length: int) -> None:
        """Do not ask the teacher before the completion has this length, in tokens."""
        self.ask_from = max(self.ask_from, length)

    def lose(self, length: int) -> None:
        """Note that the teacher was lost. The pause doubles each time, so a lost teacher costs little."""
        self.ask_from = length + PAUSE_TOKENS * (1 << self.losses)
        self.losses += 1


@dataclass(frozen=True)
class Refusal:
    """The reason why a teacher does not write a span."""

    reason: str
    degraded: bool = False
    error: TeacherError | None = None
    """Error by which the teacher was lost; None if it was not lost."""
    for_all: bool = False
    """Whether no other teacher would write the span either."""


UNNOTICED = Refusal("")
"""A refusal that is not reported, because the choice asks again soon."""


class Written(NamedTuple):
    """Tokens of a completion, or of a stretch of it."""

    teacher_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Standings:
    """A choice with all the teachers that it may ask."""

    choice: Choice
    each: Sequence[Standing]
    """One for each teacher: tools first, then from the cheapest to the dearest."""
    share: Share
    """The choice's part in the budgets that requests share."""
    ranked: Sequence[Standing] = ()
    """Standings for which the last segment's terms were made, by price."""
    told: Written = field(default_factory=Written)
    """Tokens that `news` has reported so far."""

    @classmethod
    def of(cls, choice: Choice, teachers: Sequence[NamedTeacher], share: Share) -> "Standings":
        """The standings of a choice before any teacher was asked."""
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
        """The fewest losses of any model since it last wrote something; 0 if one of them was not lost."""
        return min((standing.losses for standing in self.models), default=0)

    @property
    def lost(self) -> bool:
        """Whether all teachers that may be asked are down."""
        return all(standing.teacher.pool.down for standing in self.each if standing.may_ask)

    @property
    def reads(self) -> int:
        """The most tokens that any of the teachers would read in a call now."""
        return max((standing.view.reads for standing in self.each), default=0)

    def order(self, level: int, terms: Terms) -> list[Standing]:
        """The standings of the teachers to ask, one after the other.

        Tools come first. Then comes the model that the ``level`` of the row means, or the dearest if the
        terms ask always. Then come dearer models, then cheaper ones.
        """
        tools = [standing for standing in self.each if standing.teacher.is_tool]
        place = self._place(level, terms)
        ranked = [*self.ranked[place:], *reversed(self.ranked[:place])]
        others = [standing for standing in self.each if standing not in (*tools, *ranked)]
        length = len(self.choice.completion)
        order = [*tools, *(standing for standing in ranked if standing not in tools), *others]
        return [standing for standing in order if standing.may_ask and standing.ask_from <= length]

    def _place(self, level: int, terms: Terms) -> int:
        """Index in `ranked` of the teacher that the row means."""
        last = max(0, len(self.ranked) - 1)
        if terms.always:
            return last
        if not terms.least:
            return min(last, level)
        names = [standing.name for standing in self.ranked]
        name = terms.least[min(level, len(terms.least) - 1)].teacher  # perhaps of the last router
        return names.index(name) if name in names else 0

    def news(self) -> Written:
        """Tokens that were written since the last call of `news`."""
        before = self.told
        self.told = Written(self.choice.report.tokens, len(self.choice.completion))
        return Written(
            self.told.teacher_tokens - before.teacher_tokens,
            self.told.completion_tokens - before.completion_tokens,
        )

    def wait(self, tokens: int) -> None:
        """Let the student write this many tokens before the choice may ask again."""
        for standing in self.each:
            standing.wait(len(self.choice.completion) + tokens)

    def ask_no_more(self) -> None:
        """Let the student write the rest alone."""
        for standing in self.each:
            standing.may_ask = False

    def denied(self, refusals: Sequence[Refusal]) -> None:
        """Report the reasons for which the student continues alone."""
        report = self.choice.report
        for reason in dict.fromkeys(refusal.reason for refusal in refusals if refusal.reason):
            report.denied[reason] += 1
            ESCALATIONS.labels("denied", reason).inc()
        report.degraded |= any(refusal.degraded for refusal in refusals)
