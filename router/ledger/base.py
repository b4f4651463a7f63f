"""The nouns of the ledger: scopes and their limits, leases, denials, and the state of a scope.

A ledger keeps the budgets that many requests share: those of a session, of a tenant, and of all requests.
(One request's own budget is a `router.budget.Bucket`: it needs no ledger.) Teacher tokens are reserved
before a span, and settled after it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import count
from math import ceil, inf
from typing import Annotated, ClassVar, Literal, NamedTuple, Protocol
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from router.budget import Count, Fraction, TeacherName
from router.money import NANOS, Money, nanos

SUB_WINDOWS = 60
"""Number of sub-windows in a window, which slides by one sub-window at a time."""

SPENDABLE = 0.8
"""Share of a lease's time in which its tokens may be written. In the rest, the settlement arrives."""

PARTS = 1_000_000
"""A fraction is counted in millionths, so every comparison is between whole numbers and exact."""

LIFETIME_MS = SUB_WINDOWS * 10**14
"""Length of a window that never slides, in ms: its first sub-window lasts longer than clocks run."""

Window = Annotated[float, Field(ge=1.0, le=32 * 86400, allow_inf_nan=False)]
OnExpiry = Literal["return", "charge"]
WhenUnavailable = Literal["refuse", "allow"]
Settlement = Literal["settled", "late", "unknown", "deferred"]


class Charge(NamedTuple):
    """The most that a teacher call may cost, in nanos. Limits in money reserve this amount."""

    fixed: int = 0
    """Nanos for the tokens that the call reads."""
    each: int = 0
    """Nanos for every token that the call may write."""

    def cost(self, tokens: int) -> int:
        """The nanos of a call that writes ``tokens``. At least 1: 0 marks a lease that was given up."""
        return max(1, self.fixed + self.each * tokens)

    def tokens(self, cost: int, at_most: int) -> int:
        """Number of tokens, at most ``at_most``, that a call may write for ``cost`` nanos."""
        if cost < max(1, self.fixed):
            return 0
        return at_most if self.each == 0 else min(at_most, (cost - self.fixed) // self.each)


FREE = Charge()


class TokensPerWindow(BaseModel):
    """At most ``tokens`` teacher tokens in any interval of ``window_seconds``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    in_money: ClassVar[bool] = False

    type: Literal["tokens"] = "tokens"
    tokens: Count
    window_seconds: Window
    teacher: TeacherName | None = None
    """The only teacher whose tokens count; None: all teachers' tokens count."""

    @property
    def size(self) -> int:
        """Teacher tokens that may be spent in a window."""
        return self.tokens

    def room(self, spent: int, reserved: int, student_tokens: int) -> int:
        """Teacher tokens that may still be reserved; below 0 after a late settlement."""
        return self.tokens - spent - reserved


class FractionOfTraffic(BaseModel):
    """At every reservation, over the last window: teacher tokens <= fraction * completion tokens + slack.

    Completion tokens are those of both models. A fraction of 0 allows no teacher token at all,
    whatever the slack; a fraction of 1 allows everything.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    in_money: ClassVar[bool] = False
    teacher: ClassVar[None] = None

    type: Literal["fraction"] = "fraction"
    fraction: Fraction
    """The fraction; digits after the sixth are cut off."""
    window_seconds: Window
    slack_tokens: PositiveInt = 8
    """Teacher tokens on top of the fraction: one span, so the very first request can ask."""

    @property
    def parts(self) -> int:
        """The fraction in millionths."""
        return int(self.fraction * PARTS + 1e-6)

    def room(self, spent: int, reserved: int, student_tokens: int) -> int:
        """See `TokensPerWindow.room`. The bound still holds when all reserved tokens have been written.

        held + n <= f (student + held + n) + slack, solved for n.
        """
        if self.parts in (0, PARTS):
            return 2**53 if self.parts else 0
        held = spent + reserved
        return (self.parts * (student_tokens + held) + PARTS * (self.slack_tokens - held)) // (
            PARTS - self.parts
        )


class CostPerWindow(BaseModel):
    """The teacher's tokens, read and written, cost at most ``cost`` in any interval of ``window_seconds``.

    Amounts of such a limit are whole nanos. Its ``student_tokens`` are those of both models.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    in_money: ClassVar[bool] = True

    type: Literal["cost"] = "cost"
    cost: Money
    window_seconds: Window
    teacher: TeacherName | None = None
    """See `TokensPerWindow.teacher`."""

    @cached_property
    def size(self) -> int:
        """Nanos that may be spent in a window."""
        return nanos(self.cost)

    def room(self, spent: int, reserved: int, student_tokens: int) -> int:
        """See `TokensPerWindow.room`; in nanos."""
        return self.size - spent - reserved


@dataclass(frozen=True)
class InAll:
    """The limit of a session from its beginning to its end, in teacher tokens or in nanos."""

    type: Literal["tokens", "cost"]
    size: int
    """Teacher tokens, or nanos, that the session may spend."""
    window_seconds: ClassVar[float] = inf
    teacher: ClassVar[None] = None

    @property
    def in_money(self) -> bool:
        """Whether amounts are nanos."""
        return self.type == "cost"

    def room(self, spent: int, reserved: int, student_tokens: int) -> int:
        """See `TokensPerWindow.room`; in nanos if ``in_money``."""
        return self.size - spent - reserved


Limit = Annotated[TokensPerWindow | FractionOfTraffic | CostPerWindow, Field(discriminator="type")]
AnyLimit = TokensPerWindow | FractionOfTraffic | CostPerWindow | InAll


def tokens_within(limit: AnyLimit, room: int, charge: Charge, at_most: int) -> int:
    """Number of tokens, at most ``at_most``, that a call may write if a limit has this much room."""
    return charge.tokens(room, at_most) if limit.in_money else min(room, at_most)


def shown(limit: AnyLimit, amount: int) -> float:
    """An amount of a limit as people read it: tokens, or units of money."""
    return amount / NANOS if limit.in_money else amount


@dataclass(frozen=True)
class Scope:
    """The requests that share a limit: those of one session, of one tenant, or all."""

    kind: Literal["session", "tenant", "global"]
    key: str
    """The tenant's name; "" for the global scope; `Session.key` for a session."""
    limit: AnyLimit
    idle_ms: int = 0
    """Time without use, in ms, after which a session's state vanishes. 0: not a session, but a window."""

    @cached_property
    def id(self) -> str:
        """Name of the scope's state. It depends on the limit's window, but not on its size."""
        of = "" if self.teacher is None else f":{self.teacher}"
        return f"{self.kind}:{self.key}:{self.limit.type}:{self.window_ms}{of}"

    @property
    def teacher(self) -> str | None:
        """The only teacher whose tokens count; None: all teachers' tokens count."""
        return self.limit.teacher

    @cached_property
    def window_ms(self) -> int:
        """Length of the window, in milliseconds; a session's window never ends."""
        return LIFETIME_MS if isinstance(self.limit, InAll) else round(self.limit.window_seconds * 1000)


def sub_window_ms(window_ms: int) -> int:
    """Length of a sub-window; 60 of them are no shorter than the window."""
    return ceil(window_ms / SUB_WINDOWS)


@dataclass(frozen=True)
class Lease:
    """Teacher tokens reserved in every one of ``scopes``; to be settled once the span has ended.

    No token may be written at or after the ``deadline``: the ledger takes the lease back soon after it.
    """

    id: str
    scopes: tuple[Scope, ...]
    tokens: int
    deadline: float
    """Time on the clock of `time.monotonic`, in seconds."""
    cost: int = 0
    """Nanos reserved in the scopes with limits in money."""
    accounted: bool = True
    """False if the ledger's store was away, and the ledger allowed the span all the same."""


@dataclass(frozen=True)
class Session:
    """The session that a request belongs to, as the request describes it."""

    owner: str
    """Name of the tenant, whose sessions nobody else sees; "" if there are no tenants."""
    id: str
    tokens: int | None
    """Teacher tokens for all requests of the session together; None if the request sets none."""
    nanos: int | None
    """Nanos for all requests of the session together; None if the request sets none."""
    idle_ms: int
    """Time without use, in ms, after which the session is forgotten."""
    most: int
    """Largest number of sessions that the owner may have at a time."""

    @property
    def key(self) -> str:
        """Name of the session that no other owner's session has: owners' names have no slash."""
        return f"{self.owner}/{self.id}"

    def scopes(self, opened: "OpenedSession") -> tuple[Scope, ...]:
        """A scope for each limit that the session was opened with."""
        limits = []
        if opened.tokens is not None:
            limits.append(InAll("tokens", opened.tokens))
        if opened.nanos is not None:
            limits.append(InAll("cost", opened.nanos))
        return tuple(Scope("session", self.key, limit, self.idle_ms) for limit in limits)


class OpenedSession(NamedTuple):
    """The budget of a session: tokens, nanos, or both."""

    tokens: int | None
    nanos: int | None


class SessionProblem(Enum):
    """The reason why a session is not opened."""

    UNKNOWN = "unknown"
    """The session is new, and the request names no budget."""
    CONFLICT = "conflict"
    """The request names another budget than the session has."""
    FULL = "full"
    """The owner has too many sessions."""


@dataclass(frozen=True)
class Snapshot:
    """A scope's state at one moment, in whole tokens and milliseconds of the ledger's clock."""

    now_ms: int
    sub_window_ms: int
    spent_in: Mapping[int, int]
    """Spent teacher tokens, or nanos, by sub-window."""
    spent: int
    student: int
    reserved: int
    total_spent: int
    total_student: int
    next_expiry_ms: int | None
    """Time at which the first lease ends, in ms; None without leases."""

    def leaves_ms(self, sub_window: int) -> int:
        """Time in ms until the tokens of a sub-window leave the window."""
        return (sub_window + SUB_WINDOWS + 1) * self.sub_window_ms - self.now_ms

    def retry_after_ms(self, limit: AnyLimit, amount: int) -> int | None:
        """Time in ms until ``amount`` may fit, if nobody else takes the room; None: never."""
        missing = amount - limit.room(self.spent, self.reserved, self.student)
        if missing <= 0:
            return 0
        if isinstance(limit, FractionOfTraffic):
            return self._until_traffic_has_grown(limit, missing)
        if amount > limit.size or isinstance(limit, InAll):
            return None
        for sub_window, spent in sorted(self.spent_in.items()):
            missing -= spent
            if missing <= 0:
                return self.leaves_ms(sub_window)
        return self.sub_window_ms if self.next_expiry_ms is None else self.next_expiry_ms - self.now_ms

    def _until_traffic_has_grown(self, limit: FractionOfTraffic, missing: int) -> int | None:
        """Estimated time in ms: every student token makes room for f / (1 - f) teacher tokens."""
        if limit.parts == 0:
            return None
        window = self.sub_window_ms * SUB_WINDOWS
        needed = missing * (PARTS - limit.parts) / limit.parts
        return window if not self.student else min(window, ceil(needed / self.student * window))


@dataclass(frozen=True)
class Denial:
    """The refusal of a reservation: nothing was reserved in any scope."""

    scope: Scope
    """The scope with the least room."""
    reason: Literal["tokens", "fraction", "cost", "unavailable"]
    retry_after_seconds: float | None
    """Seconds until asking again may succeed: exact for spent tokens, else an estimate; None: never."""

    @classmethod
    def of(cls, scope: Scope, snapshot: Snapshot, tokens: int, charge: Charge = FREE) -> "Denial":
        """The refusal of ``tokens`` by a scope in this state."""
        limit = scope.limit
        amount = charge.cost(tokens) if limit.in_money else tokens
        return cls(scope, limit.type, _seconds(snapshot.retry_after_ms(limit, amount)))

    @property
    def label(self) -> str:
        """Scope and reason in one word, from a small fixed set."""
        return self.reason if self.reason == "unavailable" else f"{self.scope.kind}_{self.reason}"


@dataclass(frozen=True)
class Status:
    """The use of a scope's limit. Amounts are teacher tokens, or nanos if the limit is in money."""

    scope: Scope
    spent: int
    """Amount settled within the window."""
    reserved: int
    """Amount of the leases that are neither settled nor expired."""
    student_tokens: int
    """Completion tokens within the window without the teacher's; under a limit in money, all."""
    total_spent: int
    """Amount settled since the scope's state exists: a counter, for differences."""
    total_student: int
    """Like ``student_tokens``, but counted since the scope's state exists."""
    reset_seconds: float
    """Seconds until the whole amount that is spent now has left the window."""
    retry_after_seconds: float | None
    """Seconds until there may be room for anything; 0 if there is room now; None: never."""

    @classmethod
    def of(cls, scope: Scope, snapshot: Snapshot) -> "Status":
        """The status of a scope, from a snapshot of its state."""
        spent_in = [sub_window for sub_window, spent in snapshot.spent_in.items() if spent]
        return cls(
            scope=scope,
            spent=snapshot.spent,
            reserved=snapshot.reserved,
            student_tokens=snapshot.student,
            total_spent=snapshot.total_spent,
            total_student=snapshot.total_student,
            reset_seconds=snapshot.leaves_ms(max(spent_in)) / 1000 if spent_in else 0.0,
            retry_after_seconds=_seconds(snapshot.retry_after_ms(scope.limit, 1)),
        )

    @property
    def remaining(self) -> int:
        """Amount that may still be reserved."""
        return max(0, self.scope.limit.room(self.spent, self.reserved, self.student_tokens))

    @property
    def total_completion(self) -> int:
        """Completion tokens of both models, since the scope's state exists."""
        return self.total_student if self.scope.limit.in_money else self.total_student + self.total_spent

    @property
    def in_window(self) -> int:
        """Completion tokens of both models within the window."""
        return self.student_tokens if self.scope.limit.in_money else self.student_tokens + self.spent

    @property
    def rate(self) -> float | None:
        """The realised teacher rate over the window; None under a limit in money."""
        if self.scope.limit.in_money:
            return None
        completion = self.spent + self.student_tokens
        return self.spent / completion if completion else 0.0


class Ledger(Protocol):
    """A store of the budgets that many requests share.

    These rules hold for every interleaving of calls. A reservation is made in all scopes or in none. The
    amounts spent and reserved never exceed a scope's limit together. Settling twice has the effect of
    settling once. A lease that nobody settles ends by itself.
    """

    on_expiry: OnExpiry
    """What happens to a lease that nobody settled.

    "return": its tokens are free again. Tokens that its holder wrote and did not settle are not counted
    until they are settled late. Then the amount spent may exceed the limit by them.
    "charge": its tokens count as spent; a late settlement gives back what was not written. The bound
    then holds for every token written, even by a process that died.
    """

    async def reserve(
        self,
        scopes: Sequence[Scope],
        tokens: int,
        *,
        at_least: int | None = None,
        student_tokens: int = 0,
        charge: Charge = FREE,
    ) -> Lease | Denial:
        """Reserve ``tokens`` in every scope, or all that is left if it is at least ``at_least`` tokens.

        ``student_tokens`` are recorded in the same step, granted or not: see `record`. Limits in money
        reserve the cost of the granted tokens by ``charge``.
        """
        ...

    async def open_session(self, session: Session) -> OpenedSession | SessionProblem | None:
        """The budget of a session, which its first request sets; None if the store is away."""
        ...

    async def settle(self, lease: Lease, used: int, cost: int = 0) -> Settlement:
        """Count ``used`` of the leased tokens and ``cost`` nanos as spent, and give back the rest.

        Settling a lease again has no effect.

        Returns:
            "settled", or "late" for a lease that had expired. "unknown" if there is no such lease: it was
            settled before, or expired more than a window ago. "deferred" if the store is away: it is told
            later.
        """
        ...

    async def record(self, scopes: Sequence[Scope], student_tokens: int) -> None:
        """Count completion tokens that the teacher did not write: fractions are of all completion tokens.

        `settle` counts the teacher's own. The call is not repeated if the store is away: a lost record only
        means less room.
        """
        ...

    async def status(self, scopes: Sequence[Scope]) -> list[Status] | None:
        """The state of each scope, all at one moment; None if the store is away."""
        ...

    @property
    def available(self) -> bool:
        """Whether the ledger's store answers."""
        ...

    async def aclose(self) -> None:
        """Try once to settle all leases that are still owed, and close the connections."""
        ...


def _seconds(ms: int | None) -> float | None:
    return None if ms is None else ms / 1000


def lease_ids() -> Iterator[str]:
    """Ids that no other ledger gives out."""
    prefix = uuid4().hex
    return (f"{prefix}-{n}" for n in count(1))


def check_reservation(tokens: int, at_least: int | None, student_tokens: int) -> int:
    """The least number of tokens to grant. Raises ValueError if the numbers make no sense."""
    at_least = tokens if at_least is None else at_least
    if not 1 <= at_least <= tokens or student_tokens < 0:
        raise ValueError(f"cannot reserve {tokens} tokens, at least {at_least}, after {student_tokens}")
    return at_least


def check_settlement(lease: Lease, used: int, cost: int) -> None:
    """Raise ValueError if more was used than the lease holds."""
    if not 0 <= used <= lease.tokens:
        raise ValueError(f"a lease of {lease.tokens} tokens cannot be settled with {used}")
    if not 0 <= cost <= lease.cost:
        raise ValueError(f"a lease of {lease.cost} nanos cannot be settled with {cost}")


def reserved_cost(scopes: Sequence[Scope], charge: Charge, tokens: int) -> int:
    """Nanos that a lease of ``tokens`` reserves; 0 without a limit in money."""
    return charge.cost(tokens) if any(scope.limit.in_money for scope in scopes) else 0
