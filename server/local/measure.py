"""What a running gateway does at a given budget: held-out examples, summed up."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from measuring.examples import Example
from measuring.gateway import GatewayClient, Reply
from measuring.scores import excess, recovered


@dataclass(frozen=True)
class Answered:
    """An example and the gateway's reply to it."""

    example: Example
    reply: Reply

    @property
    def right(self) -> bool:
        return self.example.references.accepts(self.reply.text)

    @property
    def similarity(self) -> float:
        return self.example.references.similarity(self.reply.text)

    def excess(self, fraction: float, span_tokens: int) -> float:
        """Most tokens that any prefix has above its bound: fraction * length + one span; at least 0."""
        return round(max(0.0, excess(self.reply.by_teacher, fraction) - span_tokens), 6)


@dataclass(frozen=True)
class Row:
    """Many completions at one budget (a fraction of completion tokens)."""

    budget: float
    exact_match: float
    similarity: float
    teacher_rate: float
    calls_per_request: float
    max_excess_tokens: float
    tokens_per_second: float
    requests: int

    @classmethod
    def of(cls, answered: Sequence[Answered], *, budget: float, span_tokens: int, seconds: float) -> "Row":
        replies = [one.reply for one in answered]
        tokens = sum(len(reply.token_ids) for reply in replies)
        return cls(
            budget=budget,
            exact_match=_mean(one.right for one in answered),
            similarity=_mean(one.similarity for one in answered),
            teacher_rate=round(sum(reply.teacher_tokens for reply in replies) / max(tokens, 1), 6),
            calls_per_request=_mean(reply.calls for reply in replies),
            max_excess_tokens=max(one.excess(budget, span_tokens) for one in answered),
            tokens_per_second=round(tokens / seconds, 1),
            requests=len(replies),
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
    replies = await client.ask_all([example.source for example in examples], budget, advance)
    return [Answered(example, reply) for example, reply in zip(examples, replies, strict=True)]


def gap_recovered(rows: Sequence[Row], budget: float) -> float | None:
    """Share of the gap in exact match between budgets 0 and 1 that ``budget`` closes; None without a gap."""
    quality = {row.budget: row.exact_match for row in rows}
    share = recovered(quality[budget], quality[0.0], quality[1.0])
    return None if math.isnan(share) or quality[1.0] < quality[0.0] else share


def _mean(values: Iterable[float]) -> float:
    listed = [float(value) for value in values]
    return round(sum(listed) / len(listed), 6)
