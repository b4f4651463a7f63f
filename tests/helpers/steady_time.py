"""Time that passes only while nothing can run, so timeouts do not depend on the machine's speed.

A test marked `steady_time` runs in a loop with a clock of its own. The clock stands still while a task can
run or a message is on its way, however long a busy machine takes for that. When all tasks wait, the clock
moves on to the next timer. So a timeout of 0.2 s passes at once if nothing else can happen, and only then.
Clients, servers and proxies between them all have to be in this one process.
"""

import asyncio
import selectors
import time

GRACE_SECONDS = 0.01
"""Without a message for this long, none is on its way: the kernel delivers them in microseconds."""


class SteadyClock(selectors.DefaultSelector):
    """Waits for messages. If there are none, the next timer is due."""

    now = time.monotonic()
    """What `time.monotonic` returns in a test of steady time."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return the messages that are there, or let the time pass."""
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        events = super().select(GRACE_SECONDS)
        if not events:
            SteadyClock.now += timeout
        return events


class SteadyLoop(asyncio.SelectorEventLoop):
    """An event loop that takes its time from `SteadyClock`."""

    def __init__(self) -> None:
        super().__init__(SteadyClock())

    def time(self) -> float:
        return SteadyClock.now
