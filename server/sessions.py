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
"""Redis tells whole numbers apart up to here."""


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
    """What the teacher reads and writes costs, never exceeded."""

    @model_validator(mode="before")
    @classmethod
    def _text_is_id(cls, value: Any) -> Any:
        return {"id": value} if isinstance(value, str) else value


class SessionLimits(NamedTuple):
    """Limits of each owner's sessions."""

    seconds: float = 3600.0
    """A session is over when it was not used for this long."""
    most: int = 1000
    """Sessions that an owner may have at a time."""


class SessionFields(TypedDict, total=False):
    """The `session` of a response's `teacher`; the parts that its budget has."""

    id: str
    tokens: int
    tokens_spent: int
    cost: float
    cost_spent: float


class SettlingShare(Protocol):
    """A choice's part in shared budgets."""

    async def settled(self) -> None:
        """Wait until the choice has ended and all that it took is in the ledger."""


@dataclass
class OpenSession:
    """The session of one request, while it runs."""

    id: str
    budget: OpenedSession
    scopes: tuple[Scope, ...]
    ledger: Ledger
    shares: list[SettlingShare] = field(default_factory=list)
    """Of the request's choices."""

    async def report(self) -> SessionFields:
        """What the session has, and what all its requests have spent so far."""
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
        ledger: where sessions are kept.
        owner: name of the tenant.
        asked: what the request says of it.
        limits: what holds for every session.
        param: the field or header that names it.

    Raises:
        BadRequest: it is new and has no budget, or has another budget.
        TooManySessions: no more may be opened.
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
        # The ledger's store is away: by its own rule, reservations are refused or allowed.
        opened = OpenedSession(session.tokens, session.nanos)
        if opened == OpenedSession(None, None):
            opened = OpenedSession(0, None)
    return OpenSession(asked.id, opened, session.scopes(opened), ledger)
