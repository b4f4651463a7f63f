"""The ledger of a single gateway, in memory. It needs no lock, as its methods never await."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from router.ledger.account import Account
from router.ledger.base import (
    FREE,
    SPENDABLE,
    Charge,
    Denial,
    Lease,
    OnExpiry,
    OpenedSession,
    Scope,
    Session,
    SessionProblem,
    Settlement,
    Status,
    check_reservation,
    check_settlement,
    lease_ids,
    reserved_cost,
    tokens_within,
)


class MemoryLedger:
    """A `Ledger` that lives and dies with its process: a restart starts every window anew."""

    available = True

    def __init__(
        self,
        *,
        lease_seconds: float = 30.0,
        on_expiry: OnExpiry = "return",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.on_expiry: OnExpiry = on_expiry
        self._lease = lease_seconds
        self._clock = clock
        self._accounts: dict[str, Account] = {}
        self._sessions: dict[str, _OpenSession] = {}
        """Open sessions by key, in the order of their last use; the gateway keeps all for the same time."""
        self._ids = lease_ids()

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
        now = self._clock()
        accounts = [self._account(scope, now) for scope in scopes]
        granted = tokens
        tightest = -1
        for i, (scope, account) in enumerate(zip(scopes, accounts, strict=True)):
            if student_tokens:
                account.record(student_tokens)
            room = scope.limit.room(account.spent, account.reserved, account.student)
            if account.gone:
                room = 0
            fits = tokens_within(scope.limit, room, charge, granted)
            if fits < granted:
                granted = fits
                tightest = i
        if granted < at_least:
            return Denial.of(scopes[tightest], accounts[tightest].snapshot(), at_least, charge)
        cost = reserved_cost(scopes, charge, granted)
        lease = Lease(next(self._ids), tuple(scopes), granted, now + SPENDABLE * self._lease, cost)
        for scope, account in zip(scopes, accounts, strict=True):
            account.hold(lease.id, cost if scope.limit.in_money else granted, round(self._lease * 1000))
        return lease

    async def settle(self, lease: Lease, used: int, cost: int = 0) -> Settlement:
        """See `Ledger.settle`."""
        check_settlement(lease, used, cost)
        if not lease.scopes:
            return "settled"
        now = self._clock()
        outcomes = []
        for scope in lease.scopes:
            account = self._account(scope, now)
            outcomes.append(account.settle(lease.id, cost if scope.limit.in_money else used))
            if scope.limit.in_money and outcomes[-1] != "unknown":
                account.record(used)  # no other call counts them there
        # A scope with a short window may have forgotten the lease already.
        return next((outcome for outcome in outcomes if outcome != "unknown"), "unknown")

    async def record(self, scopes: Sequence[Scope], student_tokens: int) -> None:
        """See `Ledger.record`."""
        now = self._clock()
        for scope in scopes:
            self._account(scope, now).record(student_tokens)

    async def status(self, scopes: Sequence[Scope]) -> list[Status]:
        """See `Ledger.status`."""
        now = self._clock()
        return [Status.of(scope, self._account(scope, now).snapshot()) for scope in scopes]

    async def open_session(self, session: Session) -> OpenedSession | SessionProblem:
        """See `Ledger.open_session`."""
        now = int(self._clock() * 1000)
        self._forget_sessions(now)
        known = self._sessions.get(session.key)
        asked = OpenedSession(session.tokens, session.nanos)
        if known is None:
            if asked == OpenedSession(None, None):
                return SessionProblem.UNKNOWN
            if sum(each.owner == session.owner for each in self._sessions.values()) >= session.most:
                return SessionProblem.FULL
            known = _OpenSession(session.owner, asked)
        elif any(part not in (None, have) for part, have in zip(asked, known.opened, strict=True)):
            return SessionProblem.CONFLICT
        self._keep(session.key, known, session.idle_ms, now)
        return known.opened

    def _keep(self, key: str, session: "_OpenSession", idle_ms: int, now: int) -> None:
        """Note that a session is in use."""
        self._sessions.pop(key, None)
        session.ends_ms = now + max(idle_ms, 2 * round(self._lease * 1000))
        self._sessions[key] = session

    def _forget_sessions(self, now: int) -> None:
        while self._sessions:
            key, oldest = next(iter(self._sessions.items()))
            if oldest.ends_ms > now:
                return
            del self._sessions[key]

    async def aclose(self) -> None:
        """See `Ledger.aclose`."""
        pass

    def _account(self, scope: Scope, now: float) -> Account:
        """The scope's account as of now."""
        accounts = self._accounts
        if scope.idle_ms:
            self._forget_sessions(int(now * 1000))
            session = self._sessions.get(scope.key)
            if session is None:
                return Account(scope.window_ms, self.on_expiry, gone=True)
            self._keep(scope.key, session, scope.idle_ms, int(now * 1000))
            accounts = session.accounts
        account = accounts.get(scope.id)
        if account is None:
            account = accounts[scope.id] = Account(scope.window_ms, self.on_expiry)
        account.advance(int(now * 1000))
        return account


@dataclass
class _OpenSession:
    owner: str
    opened: OpenedSession
    ends_ms: int = 0
    accounts: dict[str, Account] = field(default_factory=dict)
    """The session's accounts, by scope id."""
