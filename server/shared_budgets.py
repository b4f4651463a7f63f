"""The budgets that requests share, as the span loop uses them: one `Share` for every choice."""

import asyncio
import logging
import math
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from router.controller import PriceController
from router.ledger import Charge, Denial, Lease, Ledger, Limit, Scope, Status
from router.ledger.base import FREE, shown
from router.money import NANOS, PICOS, TokenPrices, nanos_of
from server.metrics import BUDGET_LIMIT, BUDGET_PRICE, BUDGET_RATE, BUDGET_REMAINING, LEDGER_AVAILABLE
from server.sessions import OpenSession, SessionBudget, SessionLimits, open_session
from server.tenants import Tenant

logger = logging.getLogger(__name__)

DEFAULT_SESSIONS = SessionLimits()

STEER_SECONDS = 0.5
"""Seconds between two updates of the prices by the ledger; a request's terms may be this old."""
IDLE_SECONDS = 10.0
"""Seconds between two looks at a limit that no request uses now. They continue until all spending has left
the limit's window, because its metrics and its price follow the window.
"""
HOLD_SECONDS = 0.25
"""Seconds for which a choice keeps the rest of its lease, so that asks soon after need no ledger call."""


class SharedBudgets:
    """The ledger, and the prices that follow it. Settlements and records run in the background."""

    def __init__(
        self,
        ledger: Ledger,
        prices: PriceController,
        limits: Sequence[Limit] = (),
        hold_seconds: float = HOLD_SECONDS,
        sessions: SessionLimits = DEFAULT_SESSIONS,
    ) -> None:
        self.ledger = ledger
        self.prices = prices
        self.hold_seconds = hold_seconds
        self.sessions = sessions
        self.everybody = tuple(Scope("global", "", limit) for limit in limits)
        self._used: dict[str, Scope] = {}
        self._idle: dict[str, Scope] = {}
        self._idle_at = time.monotonic() + IDLE_SECONDS
        self._tasks: set[asyncio.Task[Any]] = set()

    async def open_session(self, tenant: Tenant | None, asked: SessionBudget, param: str) -> OpenSession:
        """Open a session or join it, see `server.sessions.open_session`."""
        owner = "" if tenant is None else tenant.name
        return await open_session(self.ledger, owner, asked, self.sessions, param)

    def share(self, tenant: Tenant | None, session: OpenSession | None = None) -> "Share":
        """A new choice's share of the budgets of its session, of its tenant and of all requests."""
        scopes = self.everybody if tenant is None else (*tenant.scopes, *self.everybody)
        if session is not None:
            scopes = (*session.scopes, *scopes)
        share = Share(self, scopes, 1.0 if tenant is None else tenant.priority)
        if session is not None:
            session.shares.append(share)
        return share

    async def steer(self) -> None:
        """Let the prices follow the ledger, forever."""
        while True:
            await asyncio.sleep(STEER_SECONDS)
            try:
                await self.update()
            except Exception:
                logger.exception("the prices could not be updated")

    async def update(self) -> Sequence[Status]:
        """Update the prices once by the ledger, for the limits that were used since the last update.

        Every `IDLE_SECONDS`, also for other limits that have something reserved, or spent in their window.

        Returns:
            The status of each of these limits; empty if the ledger is unreachable.
        """
        now = time.monotonic()
        seen = self._used
        self._used = {}
        if now >= self._idle_at:
            seen = self._idle | seen
            self._idle = {}
            self._idle_at = now + IDLE_SECONDS
        answer = await self.ledger.status(list(seen.values()))
        if answer is None:  # unreachable: all limits are updated when it is back
            self._idle |= seen
        statuses = answer or []
        for status in statuses:
            if status.spent or status.reserved:
                self._idle[status.scope.id] = status.scope
        self.prices.update(now, statuses)
        LEDGER_AVAILABLE.set(self.ledger.available)
        for status in statuses:
            self._publish(status)
        return statuses

    def _publish(self, status: Status) -> None:
        scope = status.scope
        limit = scope.limit
        of = "" if scope.teacher is None else f"/{scope.teacher}"
        labels = (scope.kind, scope.key, f"{limit.type}/{limit.window_seconds:g}s{of}")
        BUDGET_LIMIT.labels(*labels).set(
            limit.fraction if limit.type == "fraction" else shown(limit, limit.size)
        )
        BUDGET_REMAINING.labels(*labels).set(shown(limit, status.remaining))
        if status.rate is not None:
            BUDGET_RATE.labels(*labels).set(status.rate)
        BUDGET_PRICE.labels(*labels).set(self.prices.price([scope]))

    def use(self, scopes: Sequence[Scope]) -> None:
        """Include these limits in the next update and in the metrics; sessions would be too many."""
        self._used |= {scope.id: scope for scope in scopes if scope.kind != "session"}

    def in_background(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run work to its end in a task, even if its request ends before."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.error("a grant could not be settled", exc_info=error)

    async def aclose(self) -> None:
        """Settle everything and close the ledger."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.ledger.aclose()


@dataclass(frozen=True)
class Draw:
    """Teacher tokens that a span may have before the deadline (of `time.monotonic`)."""

    tokens: int
    deadline: float
    cost: int | None = None
    """Most that the span may cost, in picos; None if no shared limit is in money."""


def charge_of(prices: TokenPrices | None, reads: int) -> Charge:
    """The highest cost of a call that reads this many tokens; zero without prices."""
    if prices is None:
        return FREE
    return Charge(nanos_of(prices.most(reads, 0)), nanos_of(prices.most(0, 1)))


@dataclass
class Share:
    """The share of one choice in the shared budgets. It has one span at a time: reserve, then settle."""

    budgets: SharedBudgets
    scopes: tuple[Scope, ...]
    weight: float
    recorded: int = 0
    """Student tokens of this choice that the ledger knows of."""
    lease: Lease | None = None
    """The lease from which spans get their tokens, while it has some left."""
    used: int = 0
    """Tokens of the lease that were written."""
    cost: int = 0
    """Cost of these tokens in nanos, if a limit is in money."""
    renew_at: float = 0.0
    """Time (of `time.monotonic`) from which a span gets a new lease, so that it has enough time."""
    release_later: asyncio.TimerHandle | None = None
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    settlement: asyncio.Task[Any] | None = None
    """Task of the last settlement, which comes after all others."""

    @property
    def rate(self) -> float:
        """The teacher rate to aim at under the shared limits of all teachers; 1 if no limit binds."""
        return self.rate_of(None)

    def rate_of(self, teacher: str | None) -> float:
        """The rate to aim at under the limits of one teacher; with None, under the limits of all together."""
        scopes = [scope for scope in self.scopes if scope.teacher == teacher]
        return self.budgets.prices.rate(scopes, self.weight)

    def scopes_of(self, teacher: str | None) -> tuple[Scope, ...]:
        """The limits that apply to a teacher: its own, and those of all teachers together."""
        return tuple(scope for scope in self.scopes if scope.teacher in (None, teacher))

    @property
    def in_money(self) -> bool:
        """Whether a limit of the lease is in money. Each call then has its own lease, as it reads anew."""
        return self.lease is not None and any(scope.limit.in_money for scope in self.lease.scopes)

    async def reserve(
        self,
        tokens: int,
        student_tokens: int,
        *,
        ahead: int = 0,
        charge: Charge = FREE,
        teacher: str | None = None,
    ) -> Draw | Denial:
        """Reserve a span, from the current lease or from a new one.

        Args:
            tokens: the most tokens of the span.
            student_tokens: tokens of the choice that the student has written so far.
            ahead: tokens of a new lease, if that is more than ``tokens``.
            charge: the highest cost of the call.
            teacher: name of the teacher that is called; None for the limits of all teachers alone.
        """
        scopes = self.scopes_of(teacher)
        if not scopes:
            self.release()
            return Draw(tokens, math.inf)
        self._keep()
        if not self._covers(scopes, tokens):
            self.release()
            self.budgets.use(self.scopes)
            new = self._record_others(scopes, student_tokens)
            in_money = any(scope.limit.in_money for scope in scopes)
            wanted = tokens if in_money else max(tokens, ahead)
            reserved = await self.budgets.ledger.reserve(
                scopes, wanted, at_least=1, student_tokens=new, charge=charge
            )
            if isinstance(reserved, Denial):
                return reserved
            self.lease = reserved
            self.used = self.cost = 0
            self.renew_at = (time.monotonic() + reserved.deadline) / 2
        lease = self.lease
        if lease is None:
            raise RuntimeError("a lease is missing")
        cost = lease.cost * (PICOS // NANOS) if self.in_money else None
        return Draw(min(tokens, lease.tokens - self.used), lease.deadline, cost)

    def _covers(self, scopes: tuple[Scope, ...], tokens: int) -> bool:
        """Whether the current lease has this many tokens under these limits, and is not to be renewed."""
        lease = self.lease
        if lease is None or lease.scopes != scopes:
            return False
        return lease.tokens - self.used >= tokens and time.monotonic() < self.renew_at

    def _record_others(self, scopes: tuple[Scope, ...], student_tokens: int) -> int:
        """Number of the student's new tokens, for a reservation under ``scopes``; records them elsewhere."""
        new = self._unrecorded(student_tokens)
        others = [scope for scope in self.scopes if scope not in scopes]
        if others and new:
            self.budgets.in_background(self.budgets.ledger.record(others, new))
        return new

    def settle(self, used: int, cost: int | None = 0) -> None:
        """Note that ``used`` tokens of the last reservation were written.

        ``cost``: their cost in picos; None if it is unknown, so that the whole reserved cost counts.
        """
        if self.lease is None:
            return
        self.used += used
        if self.in_money:
            self.cost = self.lease.cost if cost is None else nanos_of(cost)
            self.budgets.prices.learn_cost(self.cost, used)
            self.release()
        elif self.used == self.lease.tokens:
            self.release()
        else:
            loop = asyncio.get_running_loop()
            self.release_later = loop.call_later(self.budgets.hold_seconds, self.release)

    def release(self) -> None:
        """Settle the lease, so that other requests can have the rest of it."""
        self._keep()
        if self.lease is not None:
            work = self.budgets.ledger.settle(self.lease, self.used, self.cost)
            self.settlement = self.budgets.in_background(work)
            self.lease = None

    def close(self, student_tokens: int) -> None:
        """End the share; record the tokens that the student has written since the last reservation."""
        self.release()
        if self.scopes and student_tokens > self.recorded:
            self.budgets.use(self.scopes)
            new = self._unrecorded(student_tokens)
            self.budgets.in_background(self.budgets.ledger.record(self.scopes, new))
        self.closed.set()

    async def settled(self) -> None:
        """Wait until the choice has ended and the ledger knows all that it took."""
        await self.closed.wait()
        if self.settlement is not None:
            await asyncio.wait([self.settlement])

    def _unrecorded(self, student_tokens: int) -> int:
        """Number of these tokens that the ledger does not know yet; they count as recorded from now on."""
        new = student_tokens - self.recorded
        self.recorded = student_tokens
        return new

    def _keep(self) -> None:
        if self.release_later is not None:
            self.release_later.cancel()
            self.release_later = None
