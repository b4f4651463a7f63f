"""Reasons that end a run before its last step: non-finite numbers, and signals.

The first SIGTERM or SIGINT ends the run after the present step, with a checkpoint. The second one ends it at
once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from router.errors import RunEnded

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Diverged(RunEnded, FloatingPointError):
    """A loss, a gradient or a metric is not finite; the message names the step."""


class Stopped(RunEnded):
    """The run was asked to stop and has written a checkpoint; the same command resumes from it."""

    exit_status = 130


class StopRequests:
    """The request to stop, which signals set."""

    requested = False
    """Whether the run should end after the present step."""


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Handle signals as requests to stop during the block.

    Only the main thread can receive signals; in other threads, nothing is ever requested.
    """
    requests = StopRequests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(_number: int, _frame: FrameType | None) -> None:
        requests.requested = True
        restore()

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield requests
    finally:
        restore()
