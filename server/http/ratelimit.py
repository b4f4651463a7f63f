"""Response headers about shared budgets: `x-ratelimit-*` and `Retry-After`."""

import math
from collections.abc import Sequence

from router.ledger import Status
from router.ledger.base import shown

UNBOUNDED = 2**52


def tightest(statuses: Sequence[Status]) -> Status | None:
    """The status with the least left, of those that bound anything; None without any."""
    bounded = [status for status in statuses if status.remaining < UNBOUNDED]
    return min(bounded, key=lambda status: status.remaining, default=None)


def headers(statuses: Sequence[Status]) -> dict[str, str]:
    """Headers for teacher tokens and cost: the limit, its rest, and the time until all of it is free again.

    The names follow OpenAI's `x-ratelimit-*-tokens`, which are about all tokens. Of several limits, the
    tightest is shown.
    """
    told: dict[str, str] = {}
    for what, in_money in (("tokens", False), ("cost", True)):
        status = tightest([status for status in statuses if status.scope.limit.in_money == in_money])
        if status is None:
            continue
        limit = status.scope.limit
        size = status.spent + status.reserved + status.remaining if limit.type == "fraction" else limit.size
        told |= {
            f"x-ratelimit-limit-teacher-{what}": _number(shown(limit, size)),
            f"x-ratelimit-remaining-teacher-{what}": _number(shown(limit, status.remaining)),
            f"x-ratelimit-reset-teacher-{what}": duration(status.reset_seconds),
        }
    return told


def retry_after(seconds: float | None) -> dict[str, str]:
    """The header `Retry-After` in whole seconds; empty if waiting does not help."""
    return {} if seconds is None else {"retry-after": str(max(1, math.ceil(seconds)))}


def _number(amount: float) -> str:
    return str(amount) if isinstance(amount, int) else f"{amount:.9f}".rstrip("0").rstrip(".")


def duration(seconds: float) -> str:
    """A duration as OpenAI writes it: ``250ms``, ``6m0s``, ``1h0m30s``."""
    if 0 < seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{f'{hours}h' if hours else ''}{f'{minutes}m' if hours or minutes else ''}{rest}s"
