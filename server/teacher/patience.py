"""Time limits of a teacher call."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

SPAN = 64
"""Number of tokens for which the teacher has ``span_timeout``; it has the same time for as many more."""

READING = 4096
"""Number of prompt tokens that add one more ``teacher_timeout`` to the wait for the first token."""

END_SECONDS = 1.0
"""Seconds that a teacher has to end its reply after its last token; else the connection is not reused."""


class Patience:
    """Time that a call may still wait: for its next token, for every 64 tokens, and in all."""

    def __init__(
        self,
        timeout: float,
        span_timeout: float,
        *,
        prompt_tokens: int = 0,
        started: float | None = None,
        deadline: float = math.inf,
    ) -> None:
        """Start the clock.

        Args:
            timeout: longest wait for a token, in seconds.
            span_timeout: longest wait for 64 tokens, in seconds.
            prompt_tokens: number of tokens that the teacher has to read first.
            started: start of the span, in seconds of `time.monotonic`; None for now.
            deadline: time after which nothing may come, in seconds of `time.monotonic`.
        """
        now = time.monotonic()
        self._timeout = timeout
        self._span_timeout = span_timeout
        self._deadline = deadline
        self._end = math.inf
        longer = 1 + prompt_tokens / READING
        begun = now if started is None else started
        self._due = min(now + longer * timeout, begun + longer * span_timeout)
        self._first_token = math.inf
        self.last_token = now
        """Time of the last token, or of the call's start before there is one; of `time.monotonic`."""
        self.written = 0
        """Number of tokens that have come."""

    @property
    def seconds(self) -> float:
        """Seconds left now; 0 or less when the time is up."""
        return min(self._due, self._end, self._deadline) - time.monotonic()

    def came(self, tokens: int) -> None:
        """Count tokens that have come, and wait for the next ones."""
        if not tokens:
            return
        self.last_token = time.monotonic()
        self._first_token = min(self._first_token, self.last_token)
        self.written += tokens
        span_due = self._first_token + self._span_timeout * (1 + self.written // SPAN)
        self._due = min(self.last_token + self._timeout, span_due)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Wait at most `END_SECONDS` in the block, for the reply's end. A later request has its full time."""
        self._end = time.monotonic() + END_SECONDS
        try:
            yield
        finally:
            self._end = math.inf
