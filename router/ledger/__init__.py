"""Budgets that many requests share: reserve before a span, settle after it."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from router.ledger.base import (
    AnyLimit,
    Charge,
    CostPerWindow,
    Denial,
    FractionOfTraffic,
    Lease,
    Ledger,
    Limit,
    OnExpiry,
    OpenedSession,
    Scope,
    Session,
    SessionProblem,
    Settlement,
    Status,
    TokensPerWindow,
    WhenUnavailable,
)
from router.ledger.memory import MemoryLedger

Seconds = Annotated[float, Field(ge=1.0, le=3600.0)]


class MemoryLedgerConfig(BaseModel):
    """A ledger for one gateway; a restart forgets what was spent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["memory"] = "memory"
    lease_seconds: Seconds = 30.0
    """A lease that nobody settled ends after this time. A span may take 0.8 of it."""
    on_expiry: OnExpiry = "return"
    """What happens to a lease that nobody settled: see `router.ledger.base.Ledger.on_expiry`."""

    def build(self) -> Ledger:
        """A ledger with these settings."""
        return MemoryLedger(**self.model_dump(exclude={"type"}))


def _parsable(url: str) -> str:
    try:
        _ = urlsplit(url).port
    except ValueError:  # its text would show the password
        raise ValueError(
            "has no port that is a number: special characters of a password must be percent-encoded"
        ) from None
    return url


class RedisLedgerConfig(BaseModel):
    """A ledger for several gateways, which share it by naming the same URL and prefix."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["redis"]
    url: Annotated[str, Field(pattern=r"^(rediss?|unix)://"), AfterValidator(_parsable)]
    cluster: bool = False
    """Whether the URL names a node of a Redis cluster."""
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "wheels"
    """Prefix of all keys of the ledger in Redis."""
    lease_seconds: Seconds = 30.0
    """See `MemoryLedgerConfig.lease_seconds`."""
    on_expiry: OnExpiry = "return"
    """See `MemoryLedgerConfig.on_expiry`."""
    when_unavailable: WhenUnavailable = "refuse"
    """What happens to a reservation while Redis is away."""
    timeout: PositiveFloat = 1.0
    """Longest wait for Redis, in seconds."""
    retry_seconds: PositiveFloat = 1.0
    """Seconds after which an absent Redis is tried again."""
    connections: PositiveInt = 16
    """Largest number of connections to Redis."""

    def build(self) -> Ledger:
        """A ledger with these settings."""
        from router.ledger.redis import RedisLedger  # only users of Redis need its client

        return RedisLedger.connect(**self.model_dump(exclude={"type"}))


LedgerConfig = Annotated[MemoryLedgerConfig | RedisLedgerConfig, Field(discriminator="type")]

__all__ = [
    "AnyLimit",
    "Charge",
    "CostPerWindow",
    "Denial",
    "FractionOfTraffic",
    "Lease",
    "Ledger",
    "LedgerConfig",
    "Limit",
    "MemoryLedger",
    "MemoryLedgerConfig",
    "OpenedSession",
    "RedisLedgerConfig",
    "Scope",
    "Session",
    "SessionProblem",
    "Settlement",
    "Status",
    "TokensPerWindow",
]
