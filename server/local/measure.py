"""What a running gateway does at a given budget: held-out examples through the OpenAI client, summed up."""

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI
from rapidfuzz.distance import Levenshtein

Forms = list[list[list[str]]]
"""Right answers: any one form, for each of its slots one alternative, put together without separators."""


@dataclass(frozen=True)
class Example:
    source: str
    answers: frozenset[str]
    """All right answers."""

    @classmethod
    def of(cls, source: str, references: Forms) -> "Example":
        answers = itertools.chain.from_iterable(itertools.product(*form) for form in references)
        return cls(source, frozenset(map("".join, answers)))

    def similarity(self, text: str) -> float:
        """1 minus the edit distance to the nearest right answer, as a share of the longer text; in [0, 1]."""
        return max(Levenshtein.normalized_similarity(text, answer) for answer in self.answers)


@dataclass(frozen=True)
class Reply:
    """One completion and who wrote it."""

    example: Example
    text: str
    token_ids: list[int]
    spans: list[tuple[int, int]]
    """[start, end) token offsets of the teacher's spans."""
    teacher_tokens: int
    calls: int
    degraded: bool
    """The teacher was lost, and the student finished alone."""

    @property
    def right(self) -> bool:
        return self.text in self.example.answers

    def excess(self, fraction: float, span_tokens: int) -> float:
        """Most tokens that any prefix has above its bound: fraction * length + one span; at least 0.

        Inside a span the teacher's tokens grow faster than the bound, so the ends of spans are enough.
        """
        written, most = 0, 0.0
        for start, end in self.spans:
            written += end - start
            most = max(most, written - fraction * end - span_tokens)
        return round(most, 6)


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
    def of(cls, replies: Sequence[Reply], *, budget: float, span_tokens: int, seconds: float) -> "Row":
        tokens = sum(len(reply.token_ids) for reply in replies)
        return cls(
            budget=budget,
            exact_match=_mean(reply.right for reply in replies),
            similarity=_mean(reply.example.similarity(reply.text) for reply in replies),
            teacher_rate=round(sum(reply.teacher_tokens for reply in replies) / max(tokens, 1), 6),
            calls_per_request=_mean(reply.calls for reply in replies),
            max_excess_tokens=max(reply.excess(budget, span_tokens) for reply in replies),
            tokens_per_second=round(tokens / seconds, 1),
            requests=len(replies),
        )


def load_examples(file: Path) -> list[Example]:
    """One JSON object a line: ``source`` and ``references`` (see `Forms`)."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [Example.of(**json.loads(line)) for line in lines]


class Client:
    """The gateway's user: OpenAI's own client, a bounded number of requests at once."""

    def __init__(self, url: str, *, concurrency: int) -> None:
        self._openai = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self._slots = asyncio.Semaphore(concurrency)
        self._model = ""

    async def __aenter__(self) -> "Client":
        self._model = (await self._openai.models.list()).data[0].id
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self._openai.close()

    async def ask(self, example: Example, budget: float) -> Reply:
        async with self._slots:
            completion = await self._openai.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": example.source}],
                temperature=0,
                extra_body={"teacher_budget": budget, "return_token_ids": True},
            )
        (choice,), teacher = completion.choices, completion.model_extra["teacher"]
        return Reply(
            example=example,
            text=choice.message.content or "",
            token_ids=choice.model_extra["token_ids"],
            spans=[(start, end) for start, end in teacher["spans"]],
            teacher_tokens=teacher["tokens"],
            calls=teacher["calls"],
            degraded=teacher["degraded"],
        )

    async def ask_all(
        self, examples: Sequence[Example], budget: float, advance: Callable[[], None] = lambda: None
    ) -> tuple[list[Reply], float]:
        """Replies in the order of the examples, and the seconds that all took together."""

        async def one(example: Example) -> Reply:
            reply = await self.ask(example, budget)
            advance()
            return reply

        start = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(example)) for example in examples]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures  # they all fail for one reason
        return [task.result() for task in tasks], time.perf_counter() - start


def recovered(rows: Sequence[Row], budget: float) -> float | None:
    """Share of the gap in exact match between budgets 0 and 1 that ``budget`` closes; None without a gap."""
    quality = {row.budget: row.exact_match for row in rows}
    gap = quality[1.0] - quality[0.0]
    return (quality[budget] - quality[0.0]) / gap if gap > 0 else None


def _mean(values: Any) -> float:
    values = [float(value) for value in values]
    return round(sum(values) / len(values), 6)
