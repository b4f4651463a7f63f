"""Settings and waits that the tests of the Redis ledger share."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from router.ledger import FractionOfTraffic, Scope, TokensPerWindow
from router.ledger.redis import RedisLedger

T = TypeVar("T")

TENANT = Scope("tenant", "acme", TokensPerWindow(tokens=100, window_seconds=3600))
RATE = Scope("global", "", FractionOfTraffic(fraction=0.5, window_seconds=3600, slack_tokens=8))

Connect = Callable[..., RedisLedger]


async def until(condition: Callable[[], Coroutine[Any, Any, bool]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        await asyncio.sleep(0.02)
