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
        """Fit by least squares to points (x, y), weighted by 1/y: a small step counts as much as a long one.

        Neither number of the line is negative.

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
        """The line's y at ``x``."""
        return self.fixed + self.each * x


@dataclass(frozen=True)
class Traffic:
    """Requests of one kind, with their lengths in tokens."""

    prompt: float
    completion: float
    rate: float
    """Teacher tokens / completion tokens."""
    call_tokens: float = 1.0

    @property
    def calls(self) -> float:
        """Number of teacher calls of a request."""
        return self.completion * self.rate / self.call_tokens


@dataclass(frozen=True)
class StepCosts:
    """Costs in seconds, for engines whose steps write one token for each request of a batch."""

    student_step: Line
    """Seconds of a student's step, over the batch size."""
    student_read: float
    """Seconds of the student for a position that is read, not written."""
    teacher_step: Line
    """Seconds of a teacher's step, over the batch size."""
    teacher_read: float
    """Seconds of the teacher for a position that is read, not written."""
    front: float
    """CPU seconds of the gateway's own process for a token; it has one core for any number of engines."""
    block: int = 32
    """Tokens of a block of the prefix cache. Half of the last block is read again at every call."""

    def student(self, traffic: Traffic, batch: int) -> float:
        """The student's engine seconds of one request, in a batch that is kept full."""
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
        """Requests/s of one student, one teacher and one gateway process: the first that is full decides."""
        front = self.front * traffic.completion
        return 1 / max(self.student(traffic, batch), self.teacher(traffic, batch), front)
