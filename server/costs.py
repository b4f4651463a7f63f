"""Cost of a completion: both models' tokens by kind, and the estimated cost of the teacher alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from router.money import KindCosts, PriceList, TokenUsage


class Costs(NamedTuple):
    """Costs of a completion, in picos (see `router.money.PICOS`)."""

    student: KindCosts
    teachers: Mapping[str, KindCosts]
    """Cost of each teacher that was called, by its name."""
    alone: int
    """Estimated cost of the teacher alone (of several, the dearest). As much of the prompt counts as cached
    as the first model to read it had in its cache.
    """

    @property
    def teacher(self) -> KindCosts:
        """Sum over all teachers."""
        return KindCosts.of_all(self.teachers.values())

    @property
    def saved(self) -> int:
        """Cost of the teacher alone, minus the cost of both models; negative if both cost more."""
        return self.alone - self.student.total - self.teacher.total


@dataclass
class CostSheet:
    """Tokens that both models read and wrote for one choice, each in its own vocabulary."""

    prices: PriceList | None = None
    """Prices of the gateway; None if it has none, and costs are not reported then."""
    prompt_tokens: int = 0
    prompt_cached: int | None = None
    """Prompt tokens in the student's prefix cache; None if the student has not read the prompt."""
    student: TokenUsage = field(default_factory=TokenUsage)
    """Tokens that the student read. The tokens that it wrote are an argument of `costs`."""
    teachers: dict[str, list[TokenUsage]] = field(default_factory=dict)
    """Usage of each span, by the teacher's name; it grows while the teacher writes."""

    def student_reads(self, tokens: int, cached: int) -> None:
        """Count a segment of the student: ``tokens`` tokens to read, of which ``cached`` are in its cache."""
        if self.prompt_cached is None:
            self.prompt_cached = min(cached, self.prompt_tokens)
        self.student = TokenUsage.total([self.student, TokenUsage.of(tokens, cached)])

    def teacher_called(self, name: str, usage: TokenUsage) -> None:
        """Add the usage of a new call, which grows while the teacher writes."""
        self.teachers.setdefault(name, []).append(usage)

    def add(self, other: "CostSheet") -> None:
        """Add the sheet of another choice of the same request."""
        self.prices = other.prices
        self.prompt_tokens += other.prompt_tokens
        self.prompt_cached = (self.prompt_cached or 0) + other._cached
        self.student = TokenUsage.total([self.student, other.student])
        for name, usages in other.teachers.items():
            self.teachers.setdefault(name, []).extend(usages)

    def costs(self, completion_tokens: int, student_tokens: int) -> Costs | None:
        """Costs of a completion, of which the student wrote ``student_tokens``; None without prices."""
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
