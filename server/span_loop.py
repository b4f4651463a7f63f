"""The span loop: the student writes, and asks the teacher for the next tokens if its gate wants them."""

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from router.budget import Grant
from router.ledger import Denial
from router.money import TokenPrices
from router.policy import NEVER, Policy, Terms
from server.choice import Choice
from server.completion import Piece
from server.shared_budgets import Draw, SharedBudgets, charge_of
from server.teacher.errors import TeacherError
from server.teacher.meter import Meter
from server.teacher.pool import Slot, TeacherPool
from server.teacher_view import SameTokens, ViewOf
from server.vllm_api import GracefulHTTPError

logger = logging.getLogger(__name__)

LEASE_TOKENS = 64
"""Most that is reserved at a time under a shared limit, also for a request that may have all of it."""

Student = Callable[[Choice, Terms], AsyncGenerator[Piece, None]]
"""Continues a choice's prefix by one segment, on these terms; the last piece may ask for the teacher."""


@dataclass
class Span:
    """What was reserved for a span: in the request's own budget, in the shared ones, at the teacher."""

    grant: Grant
    draw: Draw
    slot: Slot
    meter: Meter
    used: int = 0
    """Tokens of it that are in the completion."""


@dataclass
class SpanLoop:
    """Lets two models write one completion."""

    student: Student
    teacher: TeacherPool
    policy: Policy
    shared: SharedBudgets
    span_tokens: int
    on_teacher_error: Literal["degrade", "error"] = "degrade"
    prices: TokenPrices | None = None
    """The teacher's."""
    view: ViewOf = SameTokens
    """What the teacher sees of a choice."""
    running: int = 0
    """Completions that are being written."""

    async def write(self, choice: Choice) -> None:
        """Write one completion to its end.

        Raises:
            GracefulHTTPError: the teacher failed, and the gateway is to fail with it.
        """
        choice.share = self.shared.share(choice.tenant, choice.session)
        choice.view = self.view(self.teacher, choice)
        self.running += 1
        try:
            while not choice.finished:
                terms = self._terms(choice)
                if terms.always or await self._ask(choice, terms):
                    span = await self._reserve(choice, terms)
                    if span is not None:
                        await self._teach(choice, span)
                self._learn(choice)
        finally:
            self.running -= 1
            choice.share.close(choice.student_tokens)

    def _terms(self, choice: Choice) -> Terms:
        """On which terms the student may ask in its next segment."""
        if not choice.may_ask or choice.thinking_ends:
            return NEVER
        if choice.bias_room < 1:
            choice.deny("penalty", degraded=False)
            return NEVER
        terms = self.policy.terms(
            choice.bucket,
            choice.length,
            choice.length + choice.completion.tokens_left,
            ceiling=choice.share.rate,
            pause=choice.pause,
            reads=choice.view.reads,
        )
        if terms.never or choice.pause or not self.teacher.down:
            return terms
        self._lose_teacher(choice, TeacherError("breaker", "it counts as down"))
        return self._terms(choice)

    def _learn(self, choice: Choice) -> None:
        """Show the policy what came of its price since the last time."""
        news = choice.news()
        if choice.may_ask and not choice.losses and not choice.pause:
            self.policy.observe(
                choice.bucket,
                news.teacher_tokens,
                news.completion_tokens,
                ceiling=choice.share.rate,
                running=self.running,
            )

    async def _ask(self, choice: Choice, terms: Terms) -> bool:
        """Let the student write a segment; whether it asks for the teacher at its end."""
        asks = False
        async with aclosing(self.student(choice, terms)) as pieces:
            async for piece in pieces:
                choice.extend(piece, "student")
                asks = piece.asks
                if choice.finished:  # by a stop string, which the engine does not know
                    return False
        return asks and not choice.thinking_ends

    async def _reserve(self, choice: Choice, terms: Terms) -> Span | None:
        """Reserve the next span in every budget, or let the choice ask later, or never again."""
        constraint = choice.constraint
        if constraint is not None and not await constraint.catch_up(choice.completion.token_ids):
            choice.deny("grammar", degraded=False)
            return None
        if choice.view.half_written:
            choice.wait(1)
            return None
        try:
            room = await self._room(choice)
        except TeacherError as error:
            logger.warning("request %s lost the teacher: %s", choice.request_id, error)
            self._lose_teacher(choice, error)
            return None
        if room < 1:
            choice.deny("context" if choice.bias_room > 0 else "penalty", degraded=False)
            return None
        at_most = room
        if choice.share.scopes:  # what one holds, no other can have
            at_most = min(room, LEASE_TOKENS if choice.share.rate >= 1.0 else self.span_tokens)
        reads = choice.view.reads
        grant = choice.bucket.reserve(choice.length, at_most, always=terms.always, reads=reads)
        if grant is None:
            choice.deny("budget", degraded=False)
            return None
        ahead = min(room, self.span_tokens)
        draw = await choice.share.reserve(
            grant.tokens, choice.student_tokens, ahead=ahead, charge=charge_of(self.prices, reads)
        )
        if isinstance(draw, Denial):
            choice.bucket.cancel(grant)
            choice.put_off(draw.label, degraded=draw.reason == "unavailable")
            return None
        try:
            slot = await self.teacher.admit(choice.affinity)  # last: it may be a breaker's only trial
        except BaseException as error:
            choice.bucket.cancel(grant)
            choice.share.settle(0)
            if not isinstance(error, TeacherError):
                raise
            self._lose_teacher(choice, error)
            return None
        bounds = [cost for cost in (grant.cost, draw.cost) if cost is not None]
        return Span(grant, draw, slot, Meter(self.prices, min(bounds, default=None)))

    async def _room(self, choice: Choice) -> int:
        """Tokens that the completion, its thinking, the teacher's biases and its context have left."""
        room = min(choice.completion.tokens_left, choice.bias_room)
        if choice.thinking is not None and choice.thinking.left is not None:
            room = min(room, choice.thinking.left)
        context = await choice.view.room()
        return room if context is None else min(room, context)

    async def _teach(self, choice: Choice, span: Span) -> None:
        """Let the teacher write a span, and settle what it wrote."""
        choice.open_span(span.meter.usage)
        try:
            await self._take(choice, span)
        except TeacherError as error:
            logger.warning("request %s lost the teacher: %s", choice.request_id, error)
            self._lose_teacher(choice, error)
        finally:
            span.slot.release()
            choice.bucket.settle(span.grant, span.used, span.meter.cost)
            choice.share.settle(span.used, span.meter.cost)
        if not span.used:  # a character that is longer than the grant, or all was refused by a grammar
            choice.wait(1)

    async def _take(self, choice: Choice, span: Span) -> None:
        pieces = choice.view.write(span.slot, span.draw.tokens, span.draw.deadline, span.meter)
        async with aclosing(pieces):
            async for piece in pieces:
                span.used += choice.extend(piece, "teacher")
                choice.losses = 0
                if choice.finished or choice.thinking_ends:  # by a stop string: the teacher would write on
                    return

    def _lose_teacher(self, choice: Choice, error: TeacherError) -> None:
        if error.reason == "saturated":  # busy, not lost
            choice.put_off(error.reason, degraded=False)
        elif self.on_teacher_error == "error":
            raise GracefulHTTPError(error.explanation, error.http_status) from error
        elif error.refused:  # a longer prefix would fare no better
            choice.deny(error.reason, degraded=True)
        else:
            choice.lose_teacher(error.reason, degraded=True)
