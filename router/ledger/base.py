"""The nouns of the ledger: scopes and their limits, leases, denials, and what a scope's state looks like.

A ledger keeps the budgets that many requests share, of a tenant and of all together. (One request's own
budget is a `router.budget.Bucket`: it needs no ledger.) Teacher tokens are reserved before a span, and
settled after it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from math import ceil
from typing import Annotated, Literal, Protocol
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from router.budget import Count, Fraction

SUB_WINDOWS = 60
"""A window slides in steps of this fraction of itself."""

SPENDABLE = 0.8
"""Share of a lease in which its tokens may be written; the rest is for the settlement to arrive."""

PARTS = 1_000_000
"""A fraction counts in millionths, so that every comparison is one of whole numbers and exact."""

Window = Annotated[float, Field(ge=1.0, le=32 * 86400, allow_inf_nan=False)]
OnExpiry = Literal["return", "charge"]
WhenUnavailable = Literal["refuse", "allow"]
Settlement = Literal["settled", "late", "unknown", "deferred"]


class TokensPerWindow(BaseModel):
    """At most ``tokens`` teacher tokens in any interval of ``window_seconds``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["tokens"] = "tokens"
    tokens: Count
    window_seconds: Window

    def room(self, spent: int, reserved: int, student_tokens: int) -> int:
        """Teacher tokens that may still be reserved; below 0 after a late settlement."""
        return self.tokens - spent - reserved


class FractionOfTraffic(BaseModel):
    """At every reservation, over the last window: teacher tokens <= fraction * completion tokens + slack.

    Completion tokens are everybody's, the teacher's own among them. A fraction of 0 allows none at all,
    whatever the slack; a fraction of 1 allows everything.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["fraction"] = "fraction"
    fraction: Fraction
    """Counted in whole millionths, the rest is cut off."""
    window_seconds: Window
    slack_tokens: PositiveInt = 8
    """One span, with which the first request of all can ask."""

    @property
    def parts(self) -> int:
        """The fraction in millionths."""
        return int(self.fraction * PARTS + 1e-6)

    def room(self, spent: int, reserved: int, student_tokens: int) -> int:
        """As for `TokensPerWindow`: the bound still holds when all that is reserved has been written.

        held + n <= f (student + held + n) + slack, solved for n.
        """
        if self.parts in (0, PARTS):
            return 2**53 if self.parts else 0
        held = spent + reserved
        return (self.parts * (student_tokens + held) + PARTS * (self.slack_tokens - held)) // (
            PARTS - self.parts
        )


Limit = Annotated[TokensPerWindow | FractionOfTraffic, Field(discriminator="type")]


@dataclass(frozen=True)
class Scope:
    """Who shares a limit: the requests of one tenant, or all."""

    kind: Literal["tenant", "global"]
    key: str
    """The tenant's name; "" for the global scope."""
    limit: TokensPerWindow | FractionOfTraffic

    @cached_property
    def id(self) -> str:
        """Name of the scope's state. Another window is another state; another size of the limit is not."""
        return f"{self.kind}:{self.key}:{self.limit.type}:{self.window_ms}"

    @cached_property
    def window_ms(self) -> int:
        """Length of the window, in milliseconds."""
        return round(self.limit.window_seconds * 1000)


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
    """On the clock of `time.monotonic`, seconds."""
    accounted: bool = True
    """False where the ledger's store was away, and the ledger allows a span all the same."""


@dataclass(frozen=True)
class Snapshot:
    """A scope's state at one moment, in whole tokens and milliseconds of the ledger's clock."""

    now_ms: int
    sub_window_ms: int
    spent_in: Mapping[int, int]
    """Teacher tokens by sub-window."""
    spent: int
    student: int
    reserved: int
    total_spent: int
    total_student: int
    next_expiry_ms: int | None
    """When the first of the leases ends."""

    def leaves_ms(self, sub_window: int) -> int:
        """In how many ms the tokens of a sub-window leave the window."""
        return (sub_window + SUB_WINDOWS + 1) * self.sub_window_ms - self.now_ms

    def retry_after_ms(self, limit: TokensPerWindow | FractionOfTraffic, tokens: int) -> int | None:
        """In how many ms ``tokens`` more may fit, if nobody else takes them; None = never."""
        missing = tokens - limit.room(self.spent, self.reserved, self.student)
        if missing <= 0:
            return 0
        if isinstance(limit, FractionOfTraffic):
            return self._until_traffic_has_grown(limit, missing)
        if tokens > limit.tokens:
            return None
        for sub_window, spent in sorted(self.spent_in.items()):
            missing -= spent
            if missing <= 0:
                return self.leaves_ms(sub_window)
        return self.sub_window_ms if self.next_expiry_ms is None else self.next_expiry_ms - self.now_ms

    def _until_traffic_has_grown(self, limit: FractionOfTraffic, missing: int) -> int | None:
        """An estimate: every student token makes room for f / (1 - f) teacher tokens."""
        if limit.parts == 0:
            return None
        window = self.sub_window_ms * SUB_WINDOWS
        needed = missing * (PARTS - limit.parts) / limit.parts
        return window if not self.student else min(window, ceil(needed / self.student * window))


@dataclass(frozen=True)
class Denial:
    """Nothing was reserved in any scope."""

    scope: Scope
    """The one with the least room."""
    reason: Literal["tokens", "fraction", "unavailable"]
    retry_after_seconds: float | None
    """When asking again may succeed: exact for spent tokens, else an estimate; None = never."""

    @classmethod
    def of(cls, scope: Scope, snapshot: Snapshot, tokens: int) -> "Denial":
        """The refusal of ``tokens`` by a scope in this state."""
        return cls(scope, scope.limit.type, _seconds(snapshot.retry_after_ms(scope.limit, tokens)))

    @property
    def label(self) -> str:
        """Scope and reason in one word, one of few."""
        return self.reason if self.reason == "unavailable" else f"{self.scope.kind}_{self.reason}"


@dataclass(frozen=True)
class Status:
    """What a scope has spent of its limit."""

    scope: Scope
    spent: int
    """Teacher tokens settled within the window."""
    reserved: int
    """Teacher tokens of leases that are neither settled nor expired."""
    student_tokens: int
    """Completion tokens within the window that the teacher did not write."""
    total_spent: int
    """As ``spent``, since the scope's state exists: a counter, for differences."""
    total_student: int
    reset_seconds: float
    """When all that is spent now has left the window."""
    retry_after_seconds: float | None
    """When there may be room for a token; 0 where there is, None = never."""

    @classmethod
    def of(cls, scope: Scope, snapshot: Snapshot) -> "Status":
        """What a snapshot says of a scope's limit."""
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
        """Teacher tokens that may still be reserved."""
        return max(0, self.scope.limit.room(self.spent, self.reserved, self.student_tokens))

    @property
    def rate(self) -> float:
        """The realised teacher rate over the window."""
        completion = self.spent + self.student_tokens
        return self.spent / completion if completion else 0.0


class Ledger(Protocol):
    """Where the budgets of tenants and of all together are kept.

    Promised, whatever the interleaving: a reservation is made in all scopes or in none; what is spent and
    reserved never exceeds a scope's limit; settling twice is settling once; a lease that nobody settles
    ends by itself.
    """

    on_expiry: OnExpiry
    """What becomes of a lease that nobody settled.

    "return": its tokens are free again. What its holder had written and not settled is not counted,
    until it is settled late: then it is counted, and what is spent may exceed the limit by it.
    "charge": its tokens count as spent; a late settlement gives back what was not written. The bound
    then holds for every token written, by the dead too.
    """

    async def reserve(
        self,
        scopes: Sequence[Scope],
        tokens: int,
        *,
        at_least: int | None = None,
        student_tokens: int = 0,
    ) -> Lease | Denial:
        """Reserve ``tokens`` in every scope, or what all have left if that is ``at_least`` so many.

        ``student_tokens`` are recorded in the same step, granted or not: see `record`.
        """
        ...

    async def settle(self, lease: Lease, used: int) -> Settlement:
        """Count ``used`` of the leased tokens as spent, give back the others. Again: no effect.

        Returns "late" for a lease that had expired, "unknown" where there is none (it was settled
        before, or expired more than a window ago), "deferred" where the store is away: it is told later.
        """
        ...

    async def record(self, scopes: Sequence[Scope], student_tokens: int) -> None:
        """Count completion tokens that the teacher did not write: what a fraction is a fraction of.

        The teacher's own are counted by `settle`. Not repeated where the store is away: a lost record
        only means less room.
        """
        ...

    async def status(self, scopes: Sequence[Scope]) -> list[Status] | None:
        """The state of each scope, all of one moment; None where the store is away."""
        ...

    @property
    def available(self) -> bool:
        """Whether the ledger's store answers."""
        ...

    async def aclose(self) -> None:
        """Settle what is still owed, if it can be done at once, and let go of connections."""
        ...


def _seconds(ms: int | None) -> float | None:
    return None if ms is None else ms / 1000


def lease_ids() -> Iterator[str]:
    """Ids that no other ledger gives out."""
    prefix = uuid4().hex
    return (f"{prefix}-{n}" for n in count(1))


def check_reservation(tokens: int, at_least: int | None, student_tokens: int) -> int:
    """The least number of tokens to grant. Raises ValueError where the numbers make no sense."""
    at_least = tokens if at_least is None else at_least
    if not 1 <= at_least <= tokens or student_tokens < 0:
        raise ValueError(f"cannot reserve {tokens} tokens, at least {at_least}, behind {student_tokens}")
    return at_least


def check_settlement(lease: Lease, used: int) -> None:
    """Raise ValueError if more was used than the lease holds."""
    if not 0 <= used <= lease.tokens:
        raise ValueError(f"a lease of {lease.tokens} tokens cannot be settled with {used}")
