"""First-order costs of a pair on one kind of hardware, and the resources that some traffic needs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Line:
    """The line y = fixed + each · x."""

    fixed: float
    each: float

    @classmethod
    def fit(cls, points: Sequence[tuple[float, float]]) -> "Line":
        """Least squares through (x, y), each weighted by 1/y: a small step counts as much as a long one.

        Neither of the two numbers is negative.

        Raises:
            ValueError: all x are the same.
        """
        table = np.array(points, dtype=float)
        x = table[:, 0]
        y = table[:, 1]
        if np.ptp(x) == 0:
            raise ValueError("a line needs two different x")
        weights = 1 / y**2
        mean_x = np.average(x, weights=weights)
        mean_y = np.average(y, weights=weights)
        covariance = np.sum(weights * (x - mean_x) * (y - mean_y))
        variance = np.sum(weights * (x - mean_x) ** 2)
        each = max(0.0, float(covariance / variance))
        return cls(max(0.0, float(mean_y - each * mean_x)), each)

    def predict(self, x: float) -> float:
        """The line's y."""
        return self.fixed + self.each * x


@dataclass(frozen=True)
class Traffic:
    """Requests of one kind."""

    prompt: float
    completion: float
    rate: float
    """Teacher tokens / completion tokens."""
    call_tokens: float = 1.0

    @property
    def calls(self) -> float:
        """Per request."""
        return self.completion * self.rate / self.call_tokens


@dataclass(frozen=True)
class StepCosts:
    """Seconds of one engine. A step writes one token for each of a batch of requests."""

    student_step: Line
    """Over the batch."""
    student_read: float
    """For a position that is read, not written."""
    teacher_step: Line
    """Over the batch."""
    teacher_read: float
    """For a position that is read, not written."""
    front: float
    """CPU seconds of the gateway's own process for a token: one core, however many engines."""
    block: int = 32
    """Tokens of a block of the prefix cache. Half of the last block is read again at every call."""

    def student(self, traffic: Traffic, batch: int) -> float:
        """Engine seconds of one request in a batch that is kept full."""
        written = traffic.completion * (1 - traffic.rate)
        read = traffic.prompt + traffic.completion * traffic.rate + traffic.calls * self.block / 2
        return written * self.student_step.predict(batch) / batch + read * self.student_read

    def teacher(self, traffic: Traffic, batch: int) -> float:
        """The teacher's engine seconds of one request; nothing if it is never asked."""
        if not traffic.calls:
            return 0.0
        written = traffic.completion * traffic.rate
        read = traffic.prompt + traffic.completion - written + traffic.calls * self.block / 2
        return written * self.teacher_step.predict(batch) / batch + read * self.teacher_read

    def requests_per_second(self, traffic: Traffic, batch: int) -> float:
        """What one student, one teacher and one gateway process carry: the first that is full decides."""
        front = self.front * traffic.completion
        return 1 / max(self.student(traffic, batch), self.teacher(traffic, batch), front)
