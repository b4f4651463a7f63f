"""Fixtures of the unit tests. They import when used: the process that hands tests out loads no torch."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
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
def _torch_passes_on_what_it_logs() -> None:
    """As others do: to each of its 80 loggers that does not, pytest gives its handlers six times a test."""
    for name, logger in logging.root.manager.loggerDict.items():
        if name.split(".")[0] == "torch" and isinstance(logger, logging.Logger):
            logger.propagate = True


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
