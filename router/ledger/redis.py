"""The ledger of several gateways: in Redis, one script per operation."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisClusterException, RedisError

from router.ledger import scripts
from router.ledger.base import (
    FREE,
    SPENDABLE,
    Charge,
    Denial,
    FractionOfTraffic,
    Lease,
    OnExpiry,
    OpenedSession,
    Scope,
    Session,
    SessionProblem,
    Settlement,
    Snapshot,
    Status,
    WhenUnavailable,
    check_reservation,
    check_settlement,
    lease_ids,
    reserved_cost,
    sub_window_ms,
)

logger = logging.getLogger(__name__)

FAILURES = 3
"""Number of failures in a row after which Redis is left alone for a while."""
PATIENCE = 3
"""Longest wait for an answer, in timeouts, if this process itself or its queue was late."""


class _Unavailable(Exception):
    """Redis gave no answer in time, or no useful one; if ``sent``, it may have done the work."""

    def __init__(self, *, sent: bool) -> None:
        super().__init__()
        self.sent = sent


@dataclass
class _Question:
    """A call on its way to Redis."""

    is_trial: bool
    """Whether this call tries an absent Redis again."""
    sent: float = math.inf
    """Time of `time.monotonic` at which the call had a connection; inf before."""


class RedisLedger:
    """A `Ledger` shared by all gateways that name the same Redis and prefix.

    No call waits longer than ``timeout`` seconds for Redis. (If this process is late itself, or all its
    connections are in use, that may take three times as long.) If Redis gives no answer, ``when_unavailable``
    decides whether a reservation is refused or allowed. After three failures in a row Redis is asked only
    once in ``retry_seconds``, so its absence costs nobody a wait. Settlements are kept and tried again.

    The counts in Redis are as safe as its settings make them: see docs/budgets.md.
    """

    def __init__(
        self,
        client: Redis | RedisCluster,
        *,
        prefix: str = "wheels",
        lease_seconds: float = 30.0,
        on_expiry: OnExpiry = "return",
        when_unavailable: WhenUnavailable = "refuse",
        timeout: float = 1.0,
        retry_seconds: float = 1.0,
        connections: int = 16,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """``clock`` replaces the clock of Redis in tests; None: the clock of Redis."""
        self.on_expiry: OnExpiry = on_expiry
        self._client = client
        self._tag = f"{{{prefix}}}:"
        self._lease = lease_seconds
        self._when_unavailable = when_unavailable
        self._timeout = timeout
        self._retry = retry_seconds
        self._connections = asyncio.Semaphore(connections)
        self._clock = clock
        self._failures = 0
        self._retry_at = 0.0
        self._owed: dict[str, _Owed] = {}
        self._paying: asyncio.Task[None] | None = None
        self._ids = lease_ids()

    @classmethod
    def connect(
        cls, url: str, *, cluster: bool = False, timeout: float = 1.0, connections: int = 16, **options: Any
    ) -> "RedisLedger":
        """A ledger at ``url`` (redis://, rediss://, unix://), which need not be up yet."""
        # The client must not try again by itself: a record is not idempotent. The ledger has its own timeout.
        kind: type[Redis] | type[RedisCluster] = RedisCluster if cluster else Redis
        client = kind.from_url(
            url,
            max_connections=connections,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=None,
            socket_connect_timeout=None,
        )
        return cls(client, timeout=timeout, connections=connections, **options)

    async def reserve(
        self,
        scopes: Sequence[Scope],
        tokens: int,
        *,
        at_least: int | None = None,
        student_tokens: int = 0,
        charge: Charge = FREE,
    ) -> Lease | Denial:
        """See `Ledger.reserve`."""
        at_least = check_reservation(tokens, at_least, student_tokens)
        scopes = tuple(scopes)
        # Taken before the call: Redis's lease begins later, so it ends later than the holder thinks.
        deadline = self._monotonic() + SPENDABLE * self._lease
        lease = Lease(next(self._ids), scopes, tokens, deadline, reserved_cost(scopes, charge, tokens))
        if not scopes:
            return lease
        arguments = [lease.id, tokens, at_least, student_tokens, *charge]
        for scope in scopes:
            arguments += _LimitArguments.of(scope)
        try:
            reply = await self._call(scripts.reserve, scopes, arguments)
        except asyncio.CancelledError:
            self._owe(_Owed(lease, 0, 0))
            raise
        except _Unavailable as error:
            if error.sent:
                self._owe(_Owed(lease, 0, 0))
            if self._when_unavailable == "allow":
                return replace(lease, accounted=False)
            return Denial(scopes[0], "unavailable", self._retry)
        if isinstance(reply, int):
            return replace(lease, tokens=reply, cost=reserved_cost(scopes, charge, reply))
        tightest = scopes[reply[0] - 1]
        return Denial.of(tightest, _snapshot(tightest, reply[1]), at_least, charge)

    async def open_session(self, session: Session) -> OpenedSession | SessionProblem | None:
        """See `Ledger.open_session`."""
        scopes = session.scopes(OpenedSession(0, 0))
        parts = ["" if part is None else part for part in (session.tokens, session.nanos)]
        arguments = [session.id, *parts, session.idle_ms, session.most]
        index = f"{self._tag}sessions:{session.owner}"
        try:
            reply = await self._call(scripts.open_session, scopes, arguments, further=[index])
        except _Unavailable:
            return None
        if isinstance(reply, bytes):
            return SessionProblem(reply.decode())
        tokens, nanos = (None if part < 0 else part for part in reply)
        return OpenedSession(tokens, nanos)

    async def settle(self, lease: Lease, used: int, cost: int = 0) -> Settlement:
        """See `Ledger.settle`."""
        check_settlement(lease, used, cost)
        if not lease.accounted or not lease.scopes:
            return "settled"
        owed = _Owed(lease, used, cost)
        try:
            return await self._settle(owed)
        except _Unavailable:
            self._owe(owed)
            return "deferred"
        except asyncio.CancelledError:
            self._owe(owed)
            raise

    async def record(self, scopes: Sequence[Scope], student_tokens: int) -> None:
        """See `Ledger.record`."""
        if scopes and student_tokens:
            with suppress(_Unavailable):
                await self._call(scripts.record, scopes, [student_tokens, *chain(*map(_span, scopes))])

    async def status(self, scopes: Sequence[Scope]) -> list[Status] | None:
        """See `Ledger.status`."""
        if not scopes:
            return []
        try:
            replies = await self._call(scripts.status, scopes, list(chain(*map(_span, scopes))))
        except _Unavailable:
            return None
        return [
            Status.of(scope, _snapshot(scope, reply)) for scope, reply in zip(scopes, replies, strict=True)
        ]

    @property
    def available(self) -> bool:
        """False after `FAILURES` failures in a row, until Redis answers again."""
        return self._failures < FAILURES

    async def aclose(self) -> None:
        """See `Ledger.aclose`."""
        if self._paying is not None:
            self._paying.cancel()
        for owed in list(self._owed.values()):
            with suppress(_Unavailable):
                await self._settle(owed)
        await self._client.aclose()

    async def _settle(self, owed: "_Owed") -> Settlement:
        lease = owed.lease
        arguments: list[Any] = [lease.id]
        for scope in lease.scopes:
            in_money = scope.limit.in_money
            arguments += [*_span(scope), owed.cost if in_money else owed.used, owed.used if in_money else 0]
        reply = await self._call(scripts.settle, lease.scopes, arguments)
        outcome: Settlement = reply.decode()
        return outcome

    async def _call(
        self,
        script: scripts.Script,
        scopes: Iterable[Scope],
        arguments: list[Any],
        *,
        further: Sequence[str] = (),
    ) -> Any:
        """Run a script over the scopes' keys and ``further`` keys.

        Raises:
            _Unavailable: Redis is away, or no answer comes in time.
        """
        question = _Question(is_trial=not self.available)
        if question.is_trial:
            if time.monotonic() < self._retry_at:
                raise _Unavailable(sent=False)
            self._retry_at = time.monotonic() + self._retry
        keys: list[str] = []
        for scope in scopes:
            keys += _keys(self._tag, scope.id)
        keys += further
        now = "" if self._clock is None else int(self._clock() * 1000)
        arguments = [len(keys), *keys, now, self.on_expiry, round(self._lease * 1000), *arguments]
        task = asyncio.create_task(self._evaluate(question, script, arguments))
        try:
            await self._until_late(question, task)
            reply = task.result()
        except (RedisError, RedisClusterException, OSError, TimeoutError) as error:
            if question.sent == math.inf:
                raise _Unavailable(sent=False) from error
            self._failed(error)
            raise _Unavailable(sent=True) from error
        finally:
            task.cancel()
        if not self.available:
            logger.warning("the ledger's Redis is back")
        self._failures = 0
        return reply

    async def _until_late(self, question: _Question, task: asyncio.Task[Any]) -> None:
        """Wait for the task, at most for the timeout.

        Time before the question was sent, or in which this process itself stood still, does not count
        against Redis. All in all the wait is `PATIENCE` timeouts at most.

        Raises:
            TimeoutError: the task is not done.
        """
        for _ in range(PATIENCE):
            due = time.monotonic() + self._timeout
            await asyncio.wait((task,), timeout=self._timeout)
            if task.done():
                return
            in_time = time.monotonic() - due < self._timeout / 5
            if in_time and question.sent <= due - self._timeout / 2:
                break
        raise TimeoutError(f"no answer within {self._timeout} s")

    async def _evaluate(self, question: _Question, script: scripts.Script, arguments: list[Any]) -> Any:
        async with self._connections:
            if not (self.available or question.is_trial):  # it went away while this one waited for its turn
                raise _Unavailable(sent=False)
            question.sent = time.monotonic()
            try:
                return await self._client.evalsha(script.digest, *arguments)
            except NoScriptError:  # a new or restarted Redis
                return await self._client.eval(script.text, *arguments)

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        self._retry_at = time.monotonic() + self._retry
        if self._failures == FAILURES:
            logger.error(
                "the ledger's Redis is away, teacher tokens are %s: %s",
                {"refuse": "refused", "allow": "allowed"}[self._when_unavailable],
                error,
            )

    def _owe(self, owed: "_Owed") -> None:
        """Settle as soon as Redis lets us. A settlement is idempotent, so trying again is safe."""
        self._owed[owed.lease.id] = owed
        if self._paying is None or self._paying.done():
            self._paying = asyncio.create_task(self._pay())

    async def _pay(self) -> None:
        while self._owed:
            for owed in list(self._owed.values()):
                try:
                    await self._settle(owed)
                except _Unavailable:
                    break
                del self._owed[owed.lease.id]
            else:
                continue
            await asyncio.sleep(self._retry)

    def _monotonic(self) -> float:
        return time.monotonic() if self._clock is None else self._clock()


@lru_cache(4096)
def _keys(tag: str, scope_id: str) -> tuple[str, ...]:
    return tuple(f"{tag}{scope_id}:{part}" for part in ("state", "held", "leases", "lapsed"))


def _span(scope: Scope) -> tuple[int, int]:
    """A scope's window and its idle time, both in ms, as the scripts take them."""
    return scope.window_ms, scope.idle_ms


class _Owed(NamedTuple):
    """A settlement that has not reached Redis."""

    lease: Lease
    used: int
    cost: int


class _LimitArguments(NamedTuple):
    """A scope's limit, as the arguments of a script."""

    window_ms: int
    idle_ms: int
    type: str
    amount: int
    """Tokens, nanos, or parts of a fraction."""
    slack_tokens: int

    @classmethod
    def of(cls, scope: Scope) -> "_LimitArguments":
        limit = scope.limit
        if isinstance(limit, FractionOfTraffic):
            return cls(*_span(scope), limit.type, limit.parts, limit.slack_tokens)
        return cls(*_span(scope), limit.type, limit.size, 0)


def _snapshot(scope: Scope, reply: list[Any]) -> Snapshot:
    now, spent, student, reserved, total_spent, total_student, next_expiry, flat = reply
    return Snapshot(
        now_ms=now,
        sub_window_ms=sub_window_ms(scope.window_ms),
        spent_in=dict(zip(flat[::2], flat[1::2], strict=True)),
        spent=spent,
        student=student,
        reserved=reserved,
        total_spent=total_spent,
        total_student=total_student,
        next_expiry_ms=None if next_expiry < 0 else next_expiry,
    )
