"""What a response says of a budget that many requests share: `x-ratelimit-*` and `Retry-After`."""

import math
from collections.abc import Sequence

from router.ledger import Status

UNBOUNDED = 2**52


def tightest(statuses: Sequence[Status]) -> Status | None:
    """The one with the least left, of those that bound anything."""
    bounded = [status for status in statuses if status.remaining < UNBOUNDED]
    return min(bounded, key=lambda status: status.remaining, default=None)


def headers(statuses: Sequence[Status]) -> dict[str, str]:
    """Teacher tokens: the limit, what is left of it, and when nothing of it will be spent any more.

    Named as OpenAI's `x-ratelimit-*-tokens` are, which speak of all tokens. Of several limits, the tightest.
    """
    status = tightest(statuses)
    if status is None:
        return {}
    limit = status.spent + status.reserved + status.remaining
    if status.scope.limit.type == "tokens":
        limit = status.scope.limit.tokens
    return {
        "x-ratelimit-limit-teacher-tokens": str(limit),
        "x-ratelimit-remaining-teacher-tokens": str(status.remaining),
        "x-ratelimit-reset-teacher-tokens": duration(status.reset_seconds),
    }


def retry_after(seconds: float | None) -> dict[str, str]:
    """The header, in whole seconds; none where waiting does not help."""
    return {} if seconds is None else {"retry-after": str(max(1, math.ceil(seconds)))}


def duration(seconds: float) -> str:
    """As OpenAI writes it: ``250ms``, ``6m0s``, ``1h0m30s``."""
    if 0 < seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{f'{hours}h' if hours else ''}{f'{minutes}m' if hours or minutes else ''}{rest}s"
