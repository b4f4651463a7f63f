"""Ledgers at a real redis-server."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from router.ledger.redis import RedisLedger
from tests.helpers.redis_ledgers import Connect
from tests.helpers.redis_server import RedisServer


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Ledgers at a server, closed at the end of the test; patient, for machines that run tests are busy."""
    ledgers = []

    def connect(server: RedisServer, *, timeout: float = 20.0, **options: Any) -> RedisLedger:
        ledgers.append(RedisLedger.connect(server.url, timeout=timeout, **options))
        return ledgers[-1]

    yield connect
    for ledger in ledgers:
        await ledger.aclose()
