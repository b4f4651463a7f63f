"""The command `wheels serve`."""

import os
import signal
from contextlib import suppress
from typing import Any

import psutil

from server.config import ServeConfig, load


def main(argv: list[str]) -> int:
    """Serve until a signal.

    Raises:
        WheelsError: the gateway cannot start, or cannot go on.
    """
    config = load(argv)
    # The first process of a container ignores signals without a handler. So handle this one from now on,
    # until the HTTP server has handlers of its own.
    signal.signal(signal.SIGTERM, _end_at_once)
    config = _with_directories(config)
    # vLLM takes seconds to import, so a wrong flag or name is reported before.
    from server.gateway import run

    return run(config)


def _with_directories(config: ServeConfig) -> ServeConfig:
    """The configuration with directories for hub names. Only such a name needs the hub's client."""
    paths = (config.student, config.router)
    if all(path is None or path.is_dir() for path in paths):
        return config
    from server.hub import with_directories

    return with_directories(config)


def _end_at_once(number: int, _frame: Any) -> None:
    """Kill all processes. An exception would be lost, because vLLM waits for its engine."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(128 + number)
