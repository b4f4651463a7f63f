"""A gateway's life as a hypothesis state machine, against a model that only keeps lists.

The model knows which tokens were written when, and recomputes everything else at every step. It
shares no code with the ledger. It runs against any ledger: subclasses say how to build one.
"""

from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from router.ledger import (
    Charge,
    CostPerWindow,
    Denial,
    FractionOfTraffic,
    Lease,
    Ledger,
    Scope,
    TokensPerWindow,
)

T = TypeVar("T")

LEASE_SECONDS = 10
START_MS = 1_000_000_007

ALICE = Scope("tenant", "alice", TokensPerWindow(tokens=20, window_seconds=60))
BOB = Scope("tenant", "bob", TokensPerWindow(tokens=15, window_seconds=30))
ALL = Scope("global", "", TokensPerWindow(tokens=30, window_seconds=120))
RATE = Scope("global", "", FractionOfTraffic(fraction=0.25, window_seconds=60, slack_tokens=4))
MONEY = Scope("global", "", CostPerWindow(cost=90e-9, window_seconds=60))
"""A limit of 90 nanos: a call costs up to 30 nanos to read, and 5 for each token that it writes."""
SCOPES = (ALICE, BOB, ALL, RATE, MONEY)
TOGETHER = ((ALICE,), (ALICE, ALL), (BOB, ALL, MONEY), (BOB, ALL, RATE), (ALICE, RATE, MONEY))


class Clock:
    """A clock that moves only when a test moves it."""

    def __init__(self) -> None:
        self.ms = START_MS

    def __call__(self) -> float:
        return self.ms / 1000


@dataclass
class Holding:
    """A lease that a gateway holds, and the tokens written on it."""

    lease: Lease
    expires_ms: int
    deadline_ms: int
    charge: Charge
    writes: list[tuple[int, int]] = field(default_factory=list)
    """(ms, tokens) of each writing."""
    settled: bool = False
    in_time: bool = True

    @property
    def used(self) -> int:
        return sum(tokens for _, tokens in self.writes)

    @property
    def cost(self) -> int:
        """Cost of the call in nanos, with half of its prompt cached; 0 without a limit in money."""
        in_money = MONEY in self.lease.scopes
        return self.charge.fixed // 2 + self.charge.each * self.used if in_money else 0

    def held(self, scope: Scope) -> int:
        """Amount that the lease reserves in a scope, in the scope's unit."""
        return self.lease.cost if scope == MONEY else self.lease.tokens

    def spent(self, scope: Scope) -> int:
        """Amount that was used of it, in the same unit."""
        return self.cost if scope == MONEY else self.used


@dataclass
class Books:
    """The model's record of one scope."""

    scope: Scope
    charges: list[tuple[int, int]] = field(default_factory=list)
    """(ms, teacher tokens) of each charge; corrections may be below 0."""
    student: list[tuple[int, int]] = field(default_factory=list)

    @property
    def width(self) -> int:
        return int(self.scope.limit.window_seconds * 1000 / 60)

    def covers(self, ms: int, now: int) -> bool:
        """Whether a moment is in the window: the current sub-window and the 60 before it."""
        return ms // self.width >= now // self.width - 60

    def within(self, entries: list[tuple[int, int]], now: int) -> int:
        return sum(tokens for ms, tokens in entries if self.covers(ms, now))

    def room(self, reserved: int, now: int, charge: Charge) -> int:
        """Number of tokens that may still be reserved."""
        limit, held = self.scope.limit, self.within(self.charges, now) + reserved
        if isinstance(limit, CostPerWindow):
            n = 0
            while n < 12 and max(1, held + charge.fixed + charge.each * (n + 1)) <= 90:
                n += 1
            return n
        if isinstance(limit, TokensPerWindow):
            return limit.tokens - held
        f, n = Fraction(limit.fraction), 0
        student = self.within(self.student, now)
        while held + n + 1 <= f * (student + held + n + 1) + limit.slack_tokens:
            n += 1
        return n if held <= f * (student + held) + limit.slack_tokens else -1


class LedgerMachine(RuleBasedStateMachine):
    """The state machine. Subclasses set `on_expiry`, and open and reopen a ledger on `self.clock`."""

    on_expiry = "return"
    forgets = False
    """Whether a restart loses everything."""

    leases = Bundle("leases")

    def open(self) -> Ledger:
        raise NotImplementedError

    def reopen(self) -> Ledger:
        """The ledger after a restart of the gateway."""
        raise NotImplementedError

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine that never waits."""
        try:
            coroutine.send(None)
        except StopIteration as done:
            return done.value
        raise AssertionError("the ledger waited")

    def close(self) -> None:
        self.run(self.ledger.aclose())

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.now = self.clock.ms
        self.holdings: list[Holding] = []
        self.books = {scope.id: Books(scope) for scope in SCOPES}

    @initialize()
    def start(self) -> None:
        self.ledger = self.open()

    # Events in a gateway's life

    @rule(ms=st.sampled_from([1, 100, 1000, 2500, 7999, 8000, 10_000, 30_000, 60_000, 61_000, 122_000]))
    def wait(self, ms: int) -> None:
        self._pass(ms)

    @rule(
        target=leases,
        scopes=st.sampled_from(TOGETHER),
        tokens=st.integers(1, 12),
        all_or_nothing=st.booleans(),
        student=st.integers(0, 20),
        charge=st.builds(Charge, st.integers(0, 30), st.sampled_from([0, 1, 5])),
    )
    def reserve(  # type: ignore[no-untyped-def]
        self, scopes: Sequence[Scope], tokens: int, all_or_nothing: bool, student: int, charge: Charge
    ):
        at_least = tokens if all_or_nothing else 1
        for scope in scopes:
            self.books[scope.id].student.append((self.now, student))
        rooms = [self.books[s.id].room(self._reserved(s), self.now, charge) for s in scopes]
        reply = self.run(
            self.ledger.reserve(scopes, tokens, at_least=at_least, student_tokens=student, charge=charge)
        )
        expected = min(tokens, *rooms)
        if isinstance(reply, Denial):
            assert expected < at_least, "refused though there was room"
            assert rooms[scopes.index(reply.scope)] == min(rooms)
            assert reply.retry_after_seconds is None or reply.retry_after_seconds > 0
            return multiple()
        assert reply.tokens == expected
        ends = self.now + LEASE_SECONDS * 1000
        holding = Holding(reply, ends, deadline_ms=ends - 2000, charge=charge)
        assert reply.deadline * 1000 <= holding.deadline_ms + 1e-6
        self.holdings.append(holding)
        return holding

    @rule(holding=leases, tokens=st.integers(1, 12))
    def write(self, holding: Holding, tokens: int) -> None:
        """The teacher writes tokens on a lease, if its deadline has not passed."""
        tokens = min(tokens, holding.lease.tokens - holding.used)
        if tokens and not holding.settled and self.now < holding.deadline_ms:
            holding.writes.append((self.now, tokens))

    @rule(holding=leases)
    def settle(self, holding: Holding) -> None:
        """Settle a lease: in time, late, or once more."""
        outcome = self.run(self.ledger.settle(holding.lease, holding.used, holding.cost))
        known = holding in self.holdings and not holding.settled
        in_time = known and self.now < holding.expires_ms
        remembered = [books for books in self._books(holding) if books.covers(holding.expires_ms, self.now)]
        if in_time:
            assert outcome == "settled"
            for books in self._books(holding):
                books.charges.append((self.now, holding.spent(books.scope)))
                self._record(books, holding)
        elif known and remembered:
            assert outcome == "late"
            for books in remembered:
                charged = holding.held(books.scope) if self.on_expiry == "charge" else 0
                books.charges.append((holding.expires_ms, holding.spent(books.scope) - charged))
                self._record(books, holding)
        else:
            assert outcome == "unknown"
        holding.settled = True
        holding.in_time &= in_time or not known

    @rule(scopes=st.sampled_from(TOGETHER), tokens=st.integers(0, 40))
    def record(self, scopes: Sequence[Scope], tokens: int) -> None:
        self.run(self.ledger.record(scopes, tokens))
        for scope in scopes:
            self.books[scope.id].student.append((self.now, tokens))

    @rule()
    def restart(self) -> None:
        """The gateway dies without settling its leases, and starts again."""
        self.ledger = self.reopen()
        if self.forgets:
            self.now = self.clock.ms
            self.holdings = []
            self.books = {scope.id: Books(scope) for scope in SCOPES}

    @rule(ms=st.sampled_from([1, 1000, 40_000]))
    def set_clock_back(self, ms: int) -> None:
        """Set the clock back. The ledger's time stands still until the clock shows a later time than ever."""
        self.clock.ms -= ms

    # Invariants

    @invariant()
    def accounts_agree(self) -> None:
        for status in self.run(self.ledger.status(SCOPES)):
            books, now = self.books[status.scope.id], self.now
            assert status.spent == books.within(books.charges, now)
            assert status.student_tokens == books.within(books.student, now)
            assert status.reserved == self._reserved(status.scope)
            assert status.total_spent == sum(tokens for _, tokens in books.charges)

    @invariant()
    def never_over_the_bound(self) -> None:
        """The tokens written in any interval of a window's length stay within the bound."""
        for books in self.books.values():
            if not isinstance(books.scope.limit, TokensPerWindow):
                continue
            window = books.scope.window_ms
            writes = [
                write
                for holding in self.holdings
                if books.scope in holding.lease.scopes and self._counts(holding)
                for write in holding.writes
            ]
            for start, _ in writes:
                written = sum(tokens for ms, tokens in writes if start <= ms <= start + window)
                assert written <= books.scope.limit.tokens

    def teardown(self) -> None:
        """After any events: once all leases have ended and a window has passed, the whole limit is free."""
        if hasattr(self, "ledger"):
            self.clock.ms = self.now
            self._pass(LEASE_SECONDS * 1000)
            for status in self.run(self.ledger.status(SCOPES)):
                assert status.reserved == 0
            self._pass(122_000)
            for scope in (ALICE, BOB, ALL):
                lease = self.run(self.ledger.reserve([scope], scope.limit.tokens))
                assert isinstance(lease, Lease)
            self.close()

    def _counts(self, holding: Holding) -> bool:
        """Whether the bound covers a lease: unsettled tokens of returned leases are not covered."""
        if self.on_expiry == "charge":
            return True
        return holding.in_time and (holding.settled or self.now < holding.expires_ms)

    def _reserved(self, scope: Scope) -> int:
        return sum(
            holding.held(scope)
            for holding in self.holdings
            if scope in holding.lease.scopes and not holding.settled and self.now < holding.expires_ms
        )

    def _pass(self, ms: int) -> None:
        self.clock.ms += ms
        if self.clock.ms <= self.now:
            return
        self.now = self.clock.ms
        for holding in self.holdings:
            if holding.in_time and not holding.settled and self.now >= holding.expires_ms:
                holding.in_time = False
                if self.on_expiry == "charge":
                    for books in self._books(holding):
                        books.charges.append((holding.expires_ms, holding.held(books.scope)))

    def _record(self, books: Books, holding: Holding) -> None:
        """Under a limit in money, the teacher's tokens are recorded with the student's."""
        if books.scope == MONEY:
            books.student.append((self.now, holding.used))

    def _books(self, holding: Holding) -> list[Books]:
        return [self.books[scope.id] for scope in holding.lease.scopes]
