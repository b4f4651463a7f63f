"""Sessions: requests that name the same session share one budget, for example in an agent run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import TypedDict

from router.budget import Count
from router.errors import BadRequest
from router.ledger import Ledger, OpenedSession, Scope, Session, SessionProblem
from router.money import NANOS, Money, nanos

LARGEST = 2**53
"""Largest whole number up to which Redis counts exactly."""


class TooManySessions(BadRequest):
    """The owner of the key already has the most sessions allowed."""

    http_status: ClassVar[HTTPStatus] = HTTPStatus.TOO_MANY_REQUESTS


class SessionBudget(BaseModel):
    """The session that a request belongs to, and the budget that all its requests have together.

    The first request has to name a part of the budget. Later ones may repeat it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]
    tokens: Annotated[Count, Field(le=LARGEST)] | None = None
    """Teacher tokens, never exceeded."""
    cost: Money | None = None
    """Cost of what the teacher reads and writes, never exceeded."""

    @model_validator(mode="before")
    @classmethod
    def _text_is_id(cls, value: Any) -> Any:
        return {"id": value} if isinstance(value, str) else value


class SessionLimits(NamedTuple):
    """Limits of each owner's sessions."""

    seconds: float = 3600.0
    """Time after which an unused session expires, in seconds."""
    most: int = 1000
    """Most sessions that an owner may have at a time."""


class SessionFields(TypedDict, total=False):
    """The `session` in a response's `teacher` field, with the parts that its budget has."""

    id: str
    tokens: int
    tokens_spent: int
    cost: float
    cost_spent: float


class SettlingShare(Protocol):
    """A choice's part in shared budgets."""

    async def settled(self) -> None:
        """Wait until the choice has ended and the ledger knows all that it took."""


@dataclass
class OpenSession:
    """The session of one request, while it runs."""

    id: str
    budget: OpenedSession
    scopes: tuple[Scope, ...]
    ledger: Ledger
    shares: list[SettlingShare] = field(default_factory=list)
    """Shares of the request's choices."""

    async def report(self) -> SessionFields:
        """The session's budget, and what all its requests have spent so far."""
        for share in self.shares:
            await share.settled()
        fields = SessionFields(id=self.id)
        statuses: Sequence[Any] = await self.ledger.status(self.scopes) or [None] * len(self.scopes)
        if self.budget.tokens is not None:
            fields["tokens"] = self.budget.tokens
        if self.budget.nanos is not None:
            fields["cost"] = self.budget.nanos / NANOS
        for scope, status in zip(self.scopes, statuses, strict=True):
            if status is None:
                continue
            spent = status.spent + status.reserved
            if scope.limit.in_money:
                fields["cost_spent"] = spent / NANOS
            else:
                fields["tokens_spent"] = spent
        return fields


async def open_session(
    ledger: Ledger, owner: str, asked: SessionBudget, limits: SessionLimits, param: str
) -> OpenSession:
    """Open the session that a request names, or join it.

    Args:
        ledger: the ledger that keeps the sessions.
        owner: name of the tenant.
        asked: the session's id and budget in the request.
        limits: limits of every owner's sessions.
        param: the field or header that names the session.

    Raises:
        BadRequest: the session is new and the request sets no budget, or it has another budget.
        TooManySessions: the owner already has the most sessions allowed.
    """
    session = Session(
        owner,
        asked.id,
        asked.tokens,
        None if asked.cost is None else nanos(asked.cost),
        idle_ms=round(limits.seconds * 1000),
        most=limits.most,
    )
    opened = await ledger.open_session(session)
    if opened is SessionProblem.UNKNOWN:
        raise BadRequest(
            param, f"{param}: {asked.id!r} is a new session: its first request must set tokens or cost"
        )
    if opened is SessionProblem.CONFLICT:
        raise BadRequest(
            param, f"{param}: {asked.id!r} already has a different budget, set by its first request"
        )
    if opened is SessionProblem.FULL:
        raise TooManySessions(
            param, f"{param}: this API key already has {limits.most} open sessions, the most allowed"
        )
    if not isinstance(opened, OpenedSession):
        # The ledger's store is unreachable. The ledger itself then refuses or allows all reservations.
        opened = OpenedSession(session.tokens, session.nanos)
        if opened == OpenedSession(None, None):
            opened = OpenedSession(0, None)
    return OpenSession(asked.id, opened, session.scopes(opened), ledger)
