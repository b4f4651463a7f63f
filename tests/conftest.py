"""By the place of this file, what lies next to it can be imported by every test."""

import gc
import hashlib
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.redis_server import RedisServer

# It takes each process three seconds to compile the loops of gates: engines and later runs find them.
# numba looks for changes in the loops alone, not in the constants that they import.
_sources = b"".join((ROOT / "router" / name).read_bytes() for name in ("feature_layout.py", "loops.py"))
_loops = hashlib.sha256(_sources).hexdigest()[:12]
os.environ.setdefault("NUMBA_CACHE_DIR", str(ROOT / "build" / "numba" / _loops))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What the tests import stays: to look for garbage in it again and again takes a sixth of the time.

    And in what they make it is looked for more rarely than by default, after 700 objects.
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
