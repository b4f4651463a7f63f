"""`wheels serve`."""

import os
import signal
import sys
from contextlib import suppress
from typing import Any

import psutil

from server.config import ConfigError, ServeConfig, load


def main(argv: list[str]) -> int:
    """Exit status: 1 with one line on stderr when the gateway cannot start, or cannot go on."""
    try:
        config = load(argv)
    except ConfigError as error:
        return _fail(error)
    # From now on, because the first process of a container ignores what it does not handle, until the HTTP
    # server has handlers of its own.
    signal.signal(signal.SIGTERM, _end_at_once)
    # vLLM takes seconds to import: a wrong flag or name is reported before.
    try:
        config = _with_directories(config)
    except ConfigError as error:
        return _fail(error)
    except KeyboardInterrupt:
        return 130
    from router.checkpoint import CheckpointError
    from server.gateway import run
    from server.http.lifecycle import EngineDied
    from server.teacher.errors import TeacherError

    try:
        return run(config)
    except (ConfigError, CheckpointError, EngineDied, TeacherError) as error:
        return _fail(error)
    except KeyboardInterrupt:
        return 130


def _with_directories(config: ServeConfig) -> ServeConfig:
    """The hub's client is imported only for a name that is no directory."""
    paths = (config.student, config.router)
    if all(path is None or path.is_dir() for path in paths):
        return config
    from server.hub import with_directories

    return with_directories(config)


def _end_at_once(number: int, _frame: Any) -> None:
    """Not by an exception, which is lost in vLLM's wait for its engine."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(128 + number)


def _fail(error: Exception) -> int:
    print(f"wheels serve: {error}", file=sys.stderr)
    return 1
