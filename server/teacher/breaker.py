"""A circuit breaker: a teacher that keeps failing is not called for a while."""

import time
from collections.abc import Callable


class Breaker:
    """Stops calling a teacher that keeps failing, and tries it again after a while.

    It opens after ``failures`` failures in a row. ``seconds`` later, one call is let through, whose
    outcome closes it or opens it again.
    """

    def __init__(self, failures: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = failures
        self._seconds = seconds
        self._clock = clock
        self._failures = 0
        self._retry_at = 0.0

    @property
    def open(self) -> bool:
        """Whether a call would be refused now."""
        return self.tripped and self._clock() < self._retry_at

    @property
    def tripped(self) -> bool:
        """Whether the last calls failed; true from its opening until a call succeeds."""
        return self._failures >= self._limit

    def allow(self) -> bool:
        """Whether to make this call; if the breaker's one trial is due, this call is the trial."""
        if self.open:
            return False
        if self.tripped:
            self._retry_at = self._clock() + self._seconds
        return True

    def succeeded(self) -> None:
        """Note a good call."""
        self._failures = 0

    def failed(self) -> None:
        """Note a failed call; enough of them open the breaker."""
        self._failures += 1
        if self.tripped:
            self._retry_at = self._clock() + self._seconds
