"""Cost of a completion: both models' tokens by kind, and the estimated cost of the teacher alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from router.money import KindCosts, PriceList, TokenUsage


class Costs(NamedTuple):
    """In picos."""

    student: KindCosts
    teachers: Mapping[str, KindCosts]
    """Of each teacher that was called, by its name."""
    alone: int
    """By the teacher alone (of several the dearest one), with as much of the prompt in its cache as the
    first model to read it had.
    """

    @property
    def teacher(self) -> KindCosts:
        """Of all teachers."""
        return KindCosts.of_all(self.teachers.values())

    @property
    def saved(self) -> int:
        """Below 0 if two models were dearer."""
        return self.alone - self.student.total - self.teacher.total


@dataclass
class CostSheet:
    """What both models read and wrote for one choice, in their own tokens."""

    prices: PriceList | None = None
    """None where the gateway has none: nothing is shown then."""
    prompt_tokens: int = 0
    prompt_cached: int | None = None
    """Of the prompt, those in the student's prefix cache; None if the student has not read it."""
    student: TokenUsage = field(default_factory=TokenUsage)
    """What it wrote is left out: it wrote what the teacher did not."""
    teachers: dict[str, list[TokenUsage]] = field(default_factory=dict)
    """By the teacher's name, one for each of its spans; they grow while it writes."""

    def student_reads(self, tokens: int, cached: int) -> None:
        """The student begins a segment after this many tokens."""
        if self.prompt_cached is None:
            self.prompt_cached = min(cached, self.prompt_tokens)
        self.student = TokenUsage.total([self.student, TokenUsage.of(tokens, cached)])

    def teacher_called(self, name: str, usage: TokenUsage) -> None:
        """A teacher is called, and will count what it uses."""
        self.teachers.setdefault(name, []).append(usage)

    def add(self, other: "CostSheet") -> None:
        """Add another choice of the same request."""
        self.prices = other.prices
        self.prompt_tokens += other.prompt_tokens
        self.prompt_cached = (self.prompt_cached or 0) + other._cached
        self.student = TokenUsage.total([self.student, other.student])
        for name, usages in other.teachers.items():
            self.teachers.setdefault(name, []).extend(usages)

    def costs(self, completion_tokens: int, student_tokens: int) -> Costs | None:
        """What it cost, of which the student wrote ``student_tokens``; None without prices."""
        if self.prices is None:
            return None
        alone = TokenUsage.of(self.prompt_tokens, self._cached, completion_tokens)
        teachers = {}
        for name, usages in self.teachers.items():
            prices = self.prices.of_teacher(name)
            if prices is not None:
                teachers[name] = prices.costs(TokenUsage.total(usages))
        return Costs(
            student=self.prices.student.costs(replace(self.student, output=student_tokens)),
            teachers=teachers,
            alone=self.prices.dearest.cost(alone),
        )

    @property
    def _cached(self) -> int:
        if self.prompt_cached is not None:
            return self.prompt_cached
        first = next(iter(self.teachers.values()), ())
        return first[0].cached_input if first else 0
