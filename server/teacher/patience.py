"""How long a teacher call may wait."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

SPAN = 64
"""The teacher has ``span_timeout`` for this many tokens, and as long again for as many more."""

READING = 4096
"""The wait for the first token is twice ``teacher_timeout`` for a prompt of this many tokens, and so on."""

END_SECONDS = 1.0
"""After its last token a teacher has this long to end its reply, or the connection is not used again."""


class Patience:
    """How long a call may still wait: for its next token, for every 64 tokens, and in all."""

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
            prompt_tokens: what the teacher has to read first.
            started: when the span began, of `time.monotonic`; None for now.
            deadline: nothing may come later than this, of `time.monotonic`.
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
        """When the last token came; before there is one, when the call began."""
        self.written = 0
        """Tokens that have come."""

    @property
    def seconds(self) -> float:
        """What is left now; 0 or less when the time is up."""
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
        """Nothing more is needed of this reply: wait for its end only. A further request has full time."""
        self._end = time.monotonic() + END_SECONDS
        try:
            yield
        finally:
            self._end = math.inf
