"""Measures a running gateway at a given budget, on held-out examples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from measuring.examples import Example
from measuring.gateway import GatewayClient, GatewayReply
from measuring.scores import excess, recovered

DIGITS = 6
"""Decimal places of rounded results."""


@dataclass(frozen=True)
class Answered:
    """An example and the gateway's reply to it."""

    example: Example
    reply: GatewayReply

    @property
    def right(self) -> bool:
        """Whether the reply is a right answer."""
        return self.example.references.accepts(self.reply.text)

    @property
    def similarity(self) -> float:
        """Similarity to the nearest right answer, in [0, 1]."""
        return self.example.references.similarity(self.reply.text)

    def excess(self, fraction: float, span_tokens: int) -> float:
        """Most teacher tokens of any prefix above its bound, fraction * length + one span; at least 0."""
        return round(max(0.0, excess(self.reply.by_teacher, fraction) - span_tokens), DIGITS)


@dataclass(frozen=True)
class BudgetResult:
    """Results of many completions at one budget."""

    budget: float
    """A fraction of completion tokens."""
    exact_match: float
    similarity: float
    teacher_rate: float
    calls_per_request: float
    max_excess_tokens: float
    tokens_per_second: float
    requests: int

    @classmethod
    def from_answers(
        cls, answered: Sequence[Answered], *, budget: float, span_tokens: int, seconds: float
    ) -> "BudgetResult":
        """The results of these completions.

        Args:
            answered: examples with their replies, at least one.
            budget: the budget that they were asked with.
            span_tokens: length of the longest span, in tokens.
            seconds: time that all completions took together.
        """
        tokens = 0
        teacher_tokens = 0
        calls = 0
        for answer in answered:
            tokens += len(answer.reply.token_ids)
            teacher_tokens += answer.reply.teacher_tokens
            calls += answer.reply.calls
        return cls(
            budget=budget,
            exact_match=round(fmean(answer.right for answer in answered), DIGITS),
            similarity=round(fmean(answer.similarity for answer in answered), DIGITS),
            teacher_rate=round(teacher_tokens / max(tokens, 1), DIGITS),
            calls_per_request=round(calls / len(answered), DIGITS),
            max_excess_tokens=max(answer.excess(budget, span_tokens) for answer in answered),
            tokens_per_second=round(tokens / seconds, 1),
            requests=len(answered),
        )


async def answer_all(
    client: GatewayClient,
    examples: Sequence[Example],
    budget: float,
    advance: Callable[[], None] = lambda: None,
) -> list[Answered]:
    """The examples with their replies, in order; ``advance`` is called after each.

    Raises:
        GatewayError: a request failed.
    """
    sources = [example.source for example in examples]
    replies = await client.ask_all(sources, budget, advance)
    return list(map(Answered, examples, replies))


def gap_recovered(results: Sequence[BudgetResult], budget: float) -> float | None:
    """Share of the gap in exact match between budgets 0 and 1 that ``budget`` closes; None without a gap."""
    quality: dict[float, float] = {}
    for result in results:
        quality[result.budget] = result.exact_match
    share = recovered(quality[budget], quality[0.0], quality[1.0])
    return None if math.isnan(share) or quality[1.0] < quality[0.0] else share
