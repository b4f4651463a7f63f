"""Fixtures of the unit tests. They import when used: the process that hands tests out loads no torch."""

import asyncio
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


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests marked `steady_time` get its loop, others Python's."""
    steady = item.get_closest_marker("steady_time") is not None
    return {"loop": SteadyLoop if steady else asyncio.new_event_loop}


@pytest.fixture(autouse=True)
def _one_clock(request: pytest.FixtureRequest) -> None:
    """In steady time, what asks the system for the time gets the loop's."""
    if request.node.get_closest_marker("steady_time") is not None:
        request.getfixturevalue("monkeypatch").setattr(time, "monotonic", lambda: SteadyClock.now)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_arrives() -> None:
    """Also where a shell started the tests in the background: what it starts there ignores SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _a_worker_has_one_core() -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session", autouse=True)
def _few_loggers_get_handlers() -> Iterator[None]:
    """Pytest adds its handlers, six times a test, to each logger that passes nothing on.

    Torch has 80 of these: here they pass on what they log, as others do. The rest are looked for once, not
    among a thousand loggers each time.
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
    """Undo what an earlier test did to logging, or a library that it imported: one sets the root to ERROR."""
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
    """Only if it is another: a new level makes thousands of loggers forget what they knew of theirs."""
    if logger.level != level:
        logger.setLevel(level)


@pytest.fixture(scope="session")
def tokenizer() -> "PreTrainedTokenizerFast":
    from tests.helpers.tiny_router import byte_tokenizer

    return byte_tokenizer()


@pytest.fixture
def reserved() -> ReservedRows:
    """Ten visible tokens, the escalation token 10, the taps 11 to 13."""
    return ReservedRows(start=10, count=4)


@pytest.fixture
def router(reserved: ReservedRows) -> "RouterCheckpoint":
    from tests.helpers.tiny_router import tiny_router

    return tiny_router(reserved)


@pytest.fixture
def router_of_two(reserved: ReservedRows) -> "RouterCheckpoint":
    from tests.helpers.tiny_router import tiny_router_of_two

    return tiny_router_of_two(reserved)
