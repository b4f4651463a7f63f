"""Settings of all tests. The place of this file makes the folder importable for every test."""

import gc
import hashlib
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.redis_server import RedisServer

# A process needs three seconds to compile the loops of gates. With a cache, engines and later runs find them.
# numba looks for changes in the loops alone, not in the constants that they import.
_sources = b"".join((ROOT / "router" / name).read_bytes() for name in ("feature_layout.py", "loops.py"))
_loops = hashlib.sha256(_sources).hexdigest()[:12]
os.environ.setdefault("NUMBA_CACHE_DIR", str(ROOT / "build" / "numba" / _loops))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep imported objects out of garbage collection, which would take a sixth of the time.

    New objects are collected less often than by default, which is after 700 objects.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)
        gc.enable()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def durable_redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path, durable=True)
    yield server
    server.stop()
