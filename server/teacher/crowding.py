"""Limits a replica's concurrent calls by how long they wait for their first token."""

import time
from collections.abc import Callable

LONG = 0.5
"""A first token that takes more than this share of its longest wait shows a queue at the replica."""

SHORT = 0.25
"""A first token that takes less than this share of its longest wait shows room for one more call."""


class Crowding:
    """A limit on a replica's calls: halved when its queue is long, otherwise raised by one.

    A replica that gets more calls than it can serve makes every call wait. The surplus calls are better not
    made: their students continue and ask again later. (The rule is that of TCP: additive increase,
    multiplicative decrease; Chiu and Jain, 1989.)
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        """``most``: the highest limit."""
        self.limit = self._most = most
        self._clock = clock
        self._halve_from = 0.0

    def first_token(self, running: int, waited: float, longest: float) -> None:
        """Learn from a call's first token.

        Args:
            running: number of calls under way, including this one.
            waited: time until the first token, in seconds.
            longest: the longest time that was allowed for it, in seconds.
        """
        if waited > LONG * longest:
            self._halve(running, waited)
        elif waited < SHORT * longest:
            self.limit = min(self._most, self.limit + 1)

    def gave_up(self, running: int, waited: float) -> None:
        """Learn from a call that ended before its first token because the replica made it wait."""
        self._halve(running, waited)

    def _halve(self, running: int, waited: float) -> None:
        """Halve the limit, once for all calls that waited together; later calls show the effect."""
        now = self._clock()
        if now < self._halve_from:
            return
        self._halve_from = now + waited
        self.limit = max(1, min(self.limit, running) // 2)
