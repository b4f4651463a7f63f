"""The span loop: the student writes, and asks a teacher for the next tokens if its gate wants them."""

import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from router.budget import Bucket, Grant
from router.ledger import Denial
from router.policy import NEVER, Policy, Terms
from server.choice import Choice
from server.completion import Piece
from server.metrics import ESCALATIONS
from server.shared_budgets import Draw, SharedBudgets, charge_of
from server.sources import STUDENT
from server.standing import PAUSE_TOKENS, UNNOTICED, Refusal, Standing, Standings
from server.teacher.errors import TeacherError
from server.teacher.meter import Meter
from server.teacher.pool import Slot
from server.teacher.teachers import NamedTeacher
from server.vllm_api import GracefulHTTPError

logger = logging.getLogger(__name__)

LEASE_TOKENS = 64
"""Most tokens that are reserved at a time under shared limits, even if no limit binds; or for a tool."""

Student = Callable[[Choice, Terms], AsyncGenerator[Piece, None]]
"""Writes a choice's next segment, on these terms; the last piece may ask for the teacher."""

DOWN = TeacherError("breaker", "the teacher is marked as down")


@dataclass
class Span:
    """The reservations of a span: in the request's own budgets, in shared budgets, and at the teacher."""

    standing: Standing
    grants: list[tuple[Bucket, Grant]]
    draw: Draw
    slot: Slot
    meter: Meter
    used: int = 0
    """Number of the span's tokens that are in the completion."""
    opened: bool = False
    """Whether the span counts as a call; a tool without an answer does not."""

    def settle(self) -> None:
        """Give back what the span did not use of the request's own budgets."""
        for bucket, grant in self.grants:
            bucket.settle(grant, self.used, self.meter.cost)


@dataclass
class SpanLoop:
    """Lets several models write one completion."""

    student: Student
    policy: Policy
    shared: SharedBudgets
    span_tokens: int
    on_teacher_error: Literal["degrade", "error"] = "degrade"
    running: int = 0
    """Completions that are being written."""

    async def write(self, choice: Choice, teachers: Sequence[NamedTeacher]) -> None:
        """Write one completion to its end.

        Args:
            choice: a completion that has just begun.
            teachers: the teachers that it may ask: tools first, then from the cheapest to the dearest.

        Raises:
            GracefulHTTPError: the teacher failed, and ``on_teacher_error`` is "error".
        """
        share = self.shared.share(choice.tenant, choice.session)
        standings = Standings.of(choice, teachers, share)
        self.running += 1
        try:
            while not choice.finished:
                terms = self._terms(standings)
                level = 0 if terms.always else await self._ask(choice, terms)
                if level is not None:
                    await self._teach(standings, terms, level)
                self._learn(standings)
        finally:
            self.running -= 1
            share.close(choice.student_tokens)

    def _terms(self, standings: Standings) -> Terms:
        """The terms on which the student may ask in its next segment."""
        choice = standings.choice
        length = len(choice.completion)
        for standing in standings.each:
            standing.follow_budget(choice.length, length)
        if not standings.may_ask or choice.thinking_ends:
            return NEVER
        if choice.bias_room < 1:
            standings.ask_no_more()
            standings.denied([Refusal("penalty")])
            return NEVER
        standings.ranked = [standing for standing in standings.models if standing.can_be_asked(length)]
        terms = self.policy.terms(
            choice.bucket,
            choice.length,
            choice.length + choice.completion.tokens_left,
            ceiling=standings.share.rate,
            pause=standings.pause,
            reads=standings.reads,
            caps=[self._cap(standings, standing) for standing in standings.ranked] or (1.0,),
            names=[standing.name for standing in standings.ranked],
        )
        if terms.never or standings.pause or not standings.lost:
            return terms
        self._give_up(standings, [self._lose(choice, standing, DOWN) for standing in standings.each])
        return self._terms(standings)

    def _cap(self, standings: Standings, standing: Standing) -> float:
        """The highest teacher rate that a teacher's own budget and limits allow in this request."""
        choice = standings.choice
        shared = standings.share.rate_of(standing.name)
        if standing.bucket is None:
            return shared
        end = choice.length + choice.completion.tokens_left
        return min(shared, self.policy.rate(standing.bucket, choice.length, end, standing.view.reads))

    def _learn(self, standings: Standings) -> None:
        """Tell the policy what its price has realised since the last call."""
        news = standings.news()
        if standings.may_ask and not standings.losses and not standings.pause:
            share = standings.share
            own = [share.rate_of(standing.name) for standing in standings.each]
            self.policy.observe(
                standings.choice.bucket,
                news.teacher_tokens,
                news.completion_tokens,
                ceiling=min(share.rate, *own),
                running=self.running,
            )

    async def _ask(self, choice: Choice, terms: Terms) -> int | None:
        """Let the student write a segment; returns the level of the row by which it asks, or None."""
        level = None
        async with aclosing(self.student(choice, terms)) as pieces:
            async for piece in pieces:
                choice.extend(piece, STUDENT)
                level = piece.level if piece.asks else None
                if choice.finished:  # by a stop string, which the engine does not know
                    return None
        return None if choice.thinking_ends else level

    async def _teach(self, standings: Standings, terms: Terms, level: int) -> None:
        """Let the first teacher that can write a span; without one, the choice asks later, or never again."""
        refusals: list[Refusal] = []
        for standing in standings.order(level, terms):
            refusal = await self._call(standings, terms, standing)
            if refusal is None:
                return
            refusals.append(refusal)
            if refusal.for_all:
                break
        if not refusals:
            standings.wait(1)
        self._give_up(standings, refusals)

    async def _call(self, standings: Standings, terms: Terms, standing: Standing) -> Refusal | None:
        """Let one teacher write a span; returns None if the call succeeded or brought tokens."""
        span = await self._reserve(standings, terms, standing)
        if isinstance(span, Refusal):
            return span
        refusal = await self._fill(standings, span)
        if refusal is None or not span.used:
            return refusal
        self._give_up(standings, [refusal])  # the call failed in the middle of the span
        return None

    async def _reserve(self, standings: Standings, terms: Terms, standing: Standing) -> Span | Refusal:
        """Reserve the next span in every budget, and a place at the teacher."""
        choice, share = standings.choice, standings.share
        room = await self._room(standings, standing)
        if isinstance(room, Refusal):
            return room
        at_most = room
        if share.scopes:  # tokens that one request holds, no other can have
            at_most = min(room, LEASE_TOKENS if share.rate >= 1.0 else self.span_tokens)
        if standing.teacher.is_tool:  # its answer comes whole
            at_most = min(room, LEASE_TOKENS)
        grants = self._grants(choice, terms, standing, at_most)
        if isinstance(grants, Refusal):
            return grants
        prices = standing.teacher.prices
        draw = await share.reserve(
            min(grant.tokens for _, grant in grants),
            choice.student_tokens,
            ahead=min(room, self.span_tokens),
            charge=charge_of(prices, standing.view.reads),
            teacher=standing.name,
        )
        if isinstance(draw, Denial):
            _cancel(grants)
            return self._denied(standings, standing, draw)
        try:
            pool = standing.teacher.pool
            slot = await pool.admit(choice.affinity)  # last, because it may be a breaker's only trial
        except BaseException as error:
            _cancel(grants)
            share.settle(0)
            if not isinstance(error, TeacherError):
                raise
            return self._lose(choice, standing, error)
        bounds = [grant.cost for _, grant in grants] + [draw.cost]
        most = min((bound for bound in bounds if bound is not None), default=None)
        return Span(standing, grants, draw, slot, Meter(prices, most))

    def _grants(
        self, choice: Choice, terms: Terms, standing: Standing, at_most: int
    ) -> list[tuple[Bucket, Grant]] | Refusal:
        """Reserve the next span in the request's budget for this teacher, and in its budget for all."""
        grants: list[tuple[Bucket, Grant]] = []
        for bucket in (standing.bucket, choice.bucket):
            if bucket is None:
                continue
            grant = bucket.reserve(
                choice.length,
                at_most,
                always=terms.always,
                reads=standing.view.reads,
                prices=standing.teacher.prices,
                whole=standing.teacher.is_tool,
            )
            if grant is None:
                _cancel(grants)
                standing.may_ask = False
                return Refusal("budget")
            grants.append((bucket, grant))
            at_most = grant.tokens
        return grants

    def _denied(self, standings: Standings, standing: Standing, denial: Denial) -> Refusal:
        """Pause after a shared limit without room: a limit of one teacher pauses only this one."""
        refusal = Refusal(denial.label, denial.reason == "unavailable", for_all=denial.scope.teacher is None)
        if refusal.for_all:
            standings.wait(PAUSE_TOKENS)
        else:
            standing.wait(len(standings.choice.completion) + PAUSE_TOKENS)
        return refusal

    async def _room(self, standings: Standings, standing: Standing) -> int | Refusal:
        """Tokens that a span may have: limited by completion, thinking, biases and the teacher's context."""
        choice = standings.choice
        constraint = choice.constraint
        if constraint is not None and not await constraint.catch_up(choice.completion.token_ids):
            standings.ask_no_more()
            return Refusal("grammar", for_all=True)
        if standing.view.half_written:
            standing.wait(len(choice.completion) + 1)
            return UNNOTICED
        try:
            context = await standing.view.room()
        except TeacherError as error:
            logger.warning("request %s lost the teacher: %s", choice.request_id, error)
            return self._lose(choice, standing, error)
        room = min(choice.completion.tokens_left, choice.bias_room)
        if choice.thinking is not None and choice.thinking.left is not None:
            room = min(room, choice.thinking.left)
        room = room if context is None else min(room, context)
        if room < 1:
            standing.may_ask = False
            return Refusal("context" if choice.bias_room > 0 else "penalty")
        return room

    async def _fill(self, standings: Standings, span: Span) -> Refusal | None:
        """Let the teacher write a span, and settle it; returns the reason if the span broke off."""
        choice = standings.choice
        refusal = None
        if not span.standing.teacher.is_tool:
            self._open(choice, span)
        try:
            await self._take(choice, span)
            if span.standing.view.stuck:
                standings.wait(1)
                standings.denied([Refusal("characters")])
        except TeacherError as error:
            logger.warning("request %s lost the teacher: %s", choice.request_id, error)
            refusal = self._lose(choice, span.standing, error)
        finally:
            span.slot.release()
            if span.opened:
                span.settle()
                standings.share.settle(span.used, span.meter.cost)
            else:
                _cancel(span.grants)
                standings.share.settle(0)
        if not span.opened and refusal is None:
            refusal = UNNOTICED  # the tool leaves it to others
        if not span.used:  # the next character needs a larger grant, or a grammar refused all
            span.standing.wait(len(choice.completion) + 1)
        return refusal

    @staticmethod
    def _open(choice: Choice, span: Span) -> None:
        """Report that a teacher is called; the reported span and usage grow while it writes."""
        name = span.standing.name
        choice.report.open_span(name)
        choice.report.sheet.teacher_called(name, span.meter.usage)
        ESCALATIONS.labels("granted", "gate").inc()
        span.opened = True

    async def _take(self, choice: Choice, span: Span) -> None:
        standing = span.standing
        pieces = standing.view.write(span.slot, span.draw.tokens, span.draw.deadline, span.meter)
        async with aclosing(pieces):
            async for piece in pieces:
                if not span.opened:
                    self._open(choice, span)
                span.used += choice.extend(piece, standing.name)
                standing.losses = 0
                if choice.finished or choice.thinking_ends:  # by a stop string: the teacher would write on
                    return

    def _lose(self, choice: Choice, standing: Standing, error: TeacherError) -> Refusal:
        """Note that a call failed; the teacher is not asked again for a while, or at all."""
        length = len(choice.completion)
        if error.reason == "saturated":  # busy, not lost
            standing.wait(length + PAUSE_TOKENS)
            return Refusal(error.reason)
        if error.refused:  # a longer prefix would fare no better
            standing.may_ask = False
        else:
            standing.lose(length)
        return Refusal(error.reason, degraded=True, error=error)

    def _give_up(self, standings: Standings, refusals: Sequence[Refusal]) -> None:
        """Note that no teacher writes the span: the student continues alone, or the request fails."""
        lost = next((refusal.error for refusal in refusals if refusal.error is not None), None)
        if lost is not None and self.on_teacher_error == "error":
            raise GracefulHTTPError(lost.explanation, lost.http_status) from lost
        standings.denied(refusals)


def _cancel(grants: Sequence[tuple[Bucket, Grant]]) -> None:
    """Give back reservations, because the call is not made."""
    for bucket, grant in grants:
        bucket.cancel(grant)
