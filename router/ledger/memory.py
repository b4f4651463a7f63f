"""The ledger of a single gateway: in memory, without a lock because without an await."""

import time
from collections.abc import Callable, Sequence

from router.ledger.account import Account
from router.ledger.base import (
    SPENDABLE,
    Denial,
    Lease,
    OnExpiry,
    Scope,
    Settlement,
    Status,
    check_reservation,
    check_settlement,
    lease_ids,
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
        self._ids = lease_ids()

    async def reserve(
        self,
        scopes: Sequence[Scope],
        tokens: int,
        *,
        at_least: int | None = None,
        student_tokens: int = 0,
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
            if room < granted:
                granted = room
                tightest = i
        if granted < at_least:
            return Denial.of(scopes[tightest], accounts[tightest].snapshot(), at_least)
        lease = Lease(next(self._ids), tuple(scopes), granted, now + SPENDABLE * self._lease)
        for account in accounts:
            account.hold(lease.id, granted, round(self._lease * 1000))
        return lease

    async def settle(self, lease: Lease, used: int) -> Settlement:
        """See `Ledger.settle`."""
        check_settlement(lease, used)
        if not lease.scopes:
            return "settled"
        now = self._clock()
        outcomes = [self._account(scope, now).settle(lease.id, used) for scope in lease.scopes]
        # The shorter a scope's window, the sooner it forgets.
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

    async def aclose(self) -> None:
        """See `Ledger.aclose`."""
        pass

    def _account(self, scope: Scope, now: float) -> Account:
        """The scope's account as of now."""
        account = self._accounts.get(scope.id)
        if account is None:
            account = self._accounts[scope.id] = Account(scope.window_ms, self.on_expiry)
        account.advance(int(now * 1000))
        return account
