"""Fixtures of the unit tests. They import torch when used: the process that distributes tests needs none."""

import asyncio
import gc
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from _pytest import logging as pytest_logging
from hypothesis import settings

from router.reserved import ReservedRows
from tests.helpers.steady_time import SteadyClock, SteadyLoop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from router.checkpoint import RouterCheckpoint

# The same examples at every run, and no deadline: machines that run tests are busy.
settings.register_profile("unit", derandomize=True, deadline=None, database=None)
settings.load_profile("unit")
# Each full collection goes through all objects of torch and vLLM.
gc.set_threshold(100_000, 50, 100)


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests marked `steady_time` get the steady loop, others get Python's loop."""
    steady = item.get_closest_marker("steady_time") is not None
    return {"loop": SteadyLoop if steady else asyncio.new_event_loop}


@pytest.fixture(autouse=True)
def _one_clock(request: pytest.FixtureRequest) -> None:
    """In steady time, code that asks the system for the time gets the loop's time."""
    if request.node.get_closest_marker("steady_time") is not None:
        request.getfixturevalue("monkeypatch").setattr(time, "monotonic", lambda: SteadyClock.now)


@pytest.fixture(scope="session", autouse=True)
def _signals_arrive() -> None:
    """Let SIGINT and SIGHUP arrive even if a shell in the background, or nohup, started the tests."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def _a_worker_has_one_core() -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session", autouse=True)
def _few_loggers_get_handlers() -> Iterator[None]:
    """Six times a test, pytest adds its handlers to each logger that does not propagate.

    Torch has 80 such loggers: here they propagate, as others do. The others are searched for once, not among
    a thousand loggers each time.
    """
    loggers = [each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    for logger in loggers:
        if logger.name.split(".")[0] == "torch":
            logger.propagate = True
    ends = [logging.root, *(logger for logger in loggers if not logger.propagate)]

    class CatchingLogs(pytest_logging.catching_logs):
        __slots__ = ()

        def __enter__(self) -> logging.Handler:
            if self.level is not None:
                return super().__enter__()
            for logger in ends:
                logger.addHandler(self.handler)
            self.attached_loggers.extend(ends)
            return self.handler

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytest_logging, "catching_logs", CatchingLogs)
        yield


@pytest.fixture(autouse=True)
def _lines_of_every_logger_arrive() -> None:
    """Undo changes to logging by an earlier test, or by a library: one sets the root logger to ERROR."""
    if logging.root.manager.disable != logging.NOTSET:
        logging.disable(logging.NOTSET)
    set_level(logging.getLogger(), logging.WARNING)
    for name in ("server", "router", "training", "measuring"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        set_level(logger, logging.INFO)
        logger.propagate = True
        logger.disabled = False


def set_level(logger: logging.Logger, level: int) -> None:
    """Set a logger's level only if it changes: a new level clears the caches of thousands of loggers."""
    if logger.level != level:
        logger.setLevel(level)


@pytest.fixture(scope="session")
def tokenizer() -> "PreTrainedTokenizerFast":
    from tests.helpers.tiny_router import byte_tokenizer

    return byte_tokenizer()


@pytest.fixture
def reserved() -> ReservedRows:
    """Reserved rows after ten visible tokens: the escalation token is 10, the taps are 11 to 13."""
    return ReservedRows(start=10, count=4)


@pytest.fixture
def router(reserved: ReservedRows) -> "RouterCheckpoint":
    from tests.helpers.tiny_router import tiny_router

    return tiny_router(reserved)


@pytest.fixture
def router_of_two(reserved: ReservedRows) -> "RouterCheckpoint":
    from tests.helpers.tiny_router import tiny_router_of_two

    return tiny_router_of_two(reserved)
