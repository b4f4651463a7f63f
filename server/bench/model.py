"""First-order costs of a pair on one kind of hardware, and what a traffic needs by them."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """y = fixed + each · x"""

    fixed: float
    each: float

    @classmethod
    def fit(cls, points: Sequence[tuple[float, float]]) -> "Line":
        """Least squares through (x, y), each weighted by 1/y: a small step counts as much as a long one.

        Raises ValueError where all x are the same.
        """
        weights = [1 / (y * y) for _, y in points]
        total = sum(weights)
        mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
        mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
        spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
        if spread == 0:
            raise ValueError("a line needs two different x")
        slope = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
        each = max(0.0, slope / spread)
        return cls(max(0.0, mean_y - each * mean_x), each)

    def at(self, x: float) -> float:
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
class Costs:
    """Seconds of one engine. A step writes one token for each of a batch of requests."""

    student_step: Line
    """Over the batch."""
    student_read: float
    """For a position that is read, not written."""
    teacher_step: Line
    teacher_read: float
    front: float
    """CPU seconds of the gateway's own process for a token: one core, however many engines."""
    block: int = 32
    """Tokens of a block of the prefix cache: of the last one, half is read again at every call."""

    def student(self, traffic: Traffic, batch: int) -> float:
        """Engine seconds of one request in a batch that is kept full."""
        written = traffic.completion * (1 - traffic.rate)
        read = traffic.prompt + traffic.completion * traffic.rate + traffic.calls * self.block / 2
        return written * self.student_step.at(batch) / batch + read * self.student_read

    def teacher(self, traffic: Traffic, batch: int) -> float:
        """As `student`; nothing where it is never asked."""
        if not traffic.calls:
            return 0.0
        written = traffic.completion * traffic.rate
        read = traffic.prompt + traffic.completion - written + traffic.calls * self.block / 2
        return written * self.teacher_step.at(batch) / batch + read * self.teacher_read

    def requests_per_second(self, traffic: Traffic, batch: int) -> float:
        """Of one student and one teacher, whichever is full first, in front of them one gateway process."""
        busy = (self.student(traffic, batch), self.teacher(traffic, batch), self.front * traffic.completion)
        return 1 / max(busy)
