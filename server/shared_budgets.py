"""The budgets that requests share, as the span loop uses them: one `Share` for every choice."""

import asyncio
import logging
import math
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from router.controller import PriceController
from router.ledger import Denial, Lease, Ledger, Limit, Scope, Status
from server.metrics import BUDGET_LIMIT, BUDGET_PRICE, BUDGET_RATE, BUDGET_REMAINING, LEDGER_AVAILABLE
from server.tenants import Tenant

logger = logging.getLogger(__name__)

STEER_SECONDS = 0.5
"""How often the prices follow what the ledger says; and how old a request's terms may be."""
IDLE_SECONDS = 10.0
"""How often a limit is looked at that no request uses now, until what was spent has left its window: what the
metrics show of it, and its price, follow the window too.
"""
HOLD_SECONDS = 0.25
"""How long a choice keeps what its lease has left: asks that follow closely cost the ledger nothing."""


class SharedBudgets:
    """The ledger, and the prices that it makes. Settlements and records run without the request."""

    def __init__(
        self,
        ledger: Ledger,
        prices: PriceController,
        limits: Sequence[Limit] = (),
        hold_seconds: float = HOLD_SECONDS,
    ) -> None:
        self.ledger = ledger
        self.prices = prices
        self.hold_seconds = hold_seconds
        self.everybody = tuple(Scope("global", "", limit) for limit in limits)
        self._used: dict[str, Scope] = {}
        self._idle: dict[str, Scope] = {}
        self._idle_at = time.monotonic() + IDLE_SECONDS
        self._tasks: set[asyncio.Task[Any]] = set()

    def share(self, tenant: Tenant | None) -> "Share":
        """A new choice's part in the budgets of its tenant and of all."""
        scopes = self.everybody if tenant is None else (*tenant.scopes, *self.everybody)
        return Share(self, scopes, 1.0 if tenant is None else tenant.priority)

    async def steer(self) -> None:
        """Let the prices follow the ledger, for ever."""
        while True:
            await asyncio.sleep(STEER_SECONDS)
            try:
                await self.update()
            except Exception:
                logger.exception("the prices stay as they were")

    async def update(self) -> Sequence[Status]:
        """Let the prices follow the ledger once, under the limits that were used since the last time.

        Now and then those too of which something is in use or spent in its window.
        """
        now = time.monotonic()
        seen = self._used
        self._used = {}
        if now >= self._idle_at:
            seen = self._idle | seen
            self._idle = {}
            self._idle_at = now + IDLE_SECONDS
        answer = await self.ledger.status(list(seen.values()))
        if answer is None:  # it is away: all are looked at when it is back
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
        labels = (scope.kind, scope.key, f"{limit.type}/{limit.window_seconds:g}s")
        BUDGET_LIMIT.labels(*labels).set(limit.tokens if limit.type == "tokens" else limit.fraction)
        BUDGET_REMAINING.labels(*labels).set(status.remaining)
        BUDGET_RATE.labels(*labels).set(status.rate)
        BUDGET_PRICE.labels(*labels).set(self.prices.price([scope]))

    def use(self, scopes: Sequence[Scope]) -> None:
        """Show these limits among the metrics from now on."""
        self._used |= {scope.id: scope for scope in scopes}

    def in_background(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run to its end what no request has to wait for, whatever becomes of the request."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.error("a settlement failed", exc_info=error)

    async def aclose(self) -> None:
        """Settle everything and close the ledger."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.ledger.aclose()


@dataclass(frozen=True)
class Draw:
    """Teacher tokens that a span may have: none of them at or after the deadline (of `time.monotonic`)."""

    tokens: int
    deadline: float


@dataclass
class Share:
    """What one choice has to do with shared budgets. One span at a time: reserve, then settle, in turn."""

    budgets: SharedBudgets
    scopes: tuple[Scope, ...]
    weight: float
    recorded: int = 0
    """Student tokens of this choice that the ledger knows of."""
    lease: Lease | None = None
    """What the spans are drawn from, while something of it is left."""
    used: int = 0
    """Tokens of the lease that were written."""
    renew_at: float = 0.0
    """A later span gets a lease of its own, so that it has time."""
    release_later: asyncio.TimerHandle | None = None

    @property
    def rate(self) -> float:
        """The teacher rate that the shared limits leave to aim at; 1 where none binds."""
        return self.budgets.prices.rate(self.scopes, self.weight)

    async def reserve(self, tokens: int, student_tokens: int, *, ahead: int = 0) -> Draw | Denial:
        """Up to ``tokens`` for a choice of which the student has written ``student_tokens``.

        Where the lease at hand does not have them, a new one is taken, of ``ahead`` tokens if that is more.
        """
        if not self.scopes:
            return Draw(tokens, math.inf)
        self._keep()
        if self.lease is None or self.lease.tokens - self.used < tokens or time.monotonic() >= self.renew_at:
            self.release()
            self.budgets.use(self.scopes)
            new = self._unrecorded(student_tokens)
            lease = await self.budgets.ledger.reserve(
                self.scopes, max(tokens, ahead), at_least=1, student_tokens=new
            )
            if isinstance(lease, Denial):
                return lease
            self.lease = lease
            self.used = 0
            self.renew_at = (time.monotonic() + lease.deadline) / 2
        return Draw(min(tokens, self.lease.tokens - self.used), self.lease.deadline)

    def settle(self, used: int) -> None:
        """This many tokens of what was reserved last were written."""
        if self.lease is None:
            return
        self.used += used
        if self.used == self.lease.tokens:
            self.release()
        else:
            loop = asyncio.get_running_loop()
            self.release_later = loop.call_later(self.budgets.hold_seconds, self.release)

    def release(self) -> None:
        """Settle the lease: what is left of it is for others."""
        self._keep()
        if self.lease is not None:
            self.budgets.in_background(self.budgets.ledger.settle(self.lease, self.used))
            self.lease = None

    def close(self, student_tokens: int) -> None:
        """The choice has ended; record what the student has written since the last reservation."""
        self.release()
        if self.scopes and student_tokens > self.recorded:
            self.budgets.use(self.scopes)
            new = self._unrecorded(student_tokens)
            self.budgets.in_background(self.budgets.ledger.record(self.scopes, new))

    def _unrecorded(self, student_tokens: int) -> int:
        """How many of them the ledger is not told yet; it is told now."""
        new = student_tokens - self.recorded
        self.recorded = student_tokens
        return new

    def _keep(self) -> None:
        if self.release_later is not None:
            self.release_later.cancel()
            self.release_later = None
