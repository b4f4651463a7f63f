"""A running gateway, measured as its users see it: held-out sources through OpenAI's own client."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from openai import APIStatusError, AsyncOpenAI, OpenAIError

from training.evaluation.scoring import point, recovered
from training.gating.rollout import Completion
from training.gating.tree import Setting
from training.served import ServerError
from training.tasks import Example, Task

BUDGETS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
SECONDS = 300.0
"""For one completion, however long the gateway lets it wait."""

Row = dict[str, float]


@dataclass(frozen=True)
class Reply:
    """degraded: the teacher was lost, and the student finished alone."""

    text: str
    completion: Completion
    prompt_tokens: int
    degraded: bool


@dataclass(frozen=True)
class Gateway:
    """`url` without /v1; `concurrency`: requests at once; `max_tokens`: longest completion. Its key is taken
    from OPENAI_API_KEY.
    """

    url: str
    max_tokens: int
    concurrency: int = 16

    def replies(self, sources: Sequence[str], budget: float) -> list[Reply]:
        """Greedy, in the order of the sources. Raises ServerError where the gateway is away, refuses, or is
        none.
        """
        try:
            return asyncio.run(self._replies(sources, budget))
        except* OpenAIError as failures:  # they all fail for one reason
            error = failures.exceptions[0]
            while isinstance(error, ExceptionGroup):
                error = error.exceptions[0]
            problem = error.response.text[:300] if isinstance(error, APIStatusError) else str(error)
            raise ServerError(f"the gateway at {self.url}: {problem}") from error

    async def _replies(self, sources: Sequence[str], budget: float) -> list[Reply]:
        key = os.environ.get("OPENAI_API_KEY", "none")
        slots = asyncio.Semaphore(self.concurrency)
        async with AsyncOpenAI(base_url=f"{self.url.rstrip('/')}/v1", api_key=key, timeout=SECONDS) as client:
            model = (await client.models.list()).data[0].id

            async def reply(source: str) -> Reply:
                async with slots:
                    return await self._reply(client, model, source, budget)

            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(reply(source)) for source in sources]
        return [task.result() for task in tasks]

    async def _reply(self, client: AsyncOpenAI, model: str, source: str, budget: float) -> Reply:
        answer = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": source}],
            temperature=0,
            max_tokens=self.max_tokens,
            extra_body={"teacher_budget": budget, "return_token_ids": True},
        )
        report = (answer.model_extra or {}).get("teacher")
        if report is None:
            raise OpenAIError("its replies have no `teacher`: is it served by `wheels serve`?")
        (choice,) = answer.choices
        tokens = choice.model_extra["token_ids"]
        by_teacher = [False] * len(tokens)
        for start, end in report["spans"]:
            by_teacher[start:end] = [True] * (end - start)
        starts = [start for start, _ in report["spans"]]
        completion = Completion(tokens, by_teacher, starts)
        return Reply(choice.message.content or "", completion, answer.usage.prompt_tokens, report["degraded"])


@dataclass(frozen=True)
class Measured:
    """student, teacher: quality at budgets 0 and 1. rows: of all budgets, see
    `training.evaluation.scoring.Point`, with `pgr` and `degraded`, the number of requests that lost their
    teacher. completions: of each row.
    """

    student: float
    teacher: float
    rows: list[Row]
    completions: list[list[Completion]]


def measure(
    gateway: Gateway, task: Task, examples: list[Example], budgets: Sequence[float], span_tokens: int
) -> Measured:
    """span_tokens: what the gateway's bucket lends, for `excess`. Raises ServerError."""
    points, completions = [], []
    for budget in sorted({0.0, *budgets, 1.0}):
        replies = gateway.replies([example.source for example in examples], budget)
        answers = [reply.text for reply in replies]
        scores = task.score(examples, answers)
        completions.append([reply.completion for reply in replies])
        of = point(
            completions[-1],
            [reply.prompt_tokens for reply in replies],
            Setting("gateway", 0.0, budget, span_tokens),  # its price is its own
            task.quality(examples, answers, scores.quality),
            sum(scores.similarity) / len(examples),
        )
        points.append((of, sum(reply.degraded for reply in replies)))
    student, teacher = points[0][0].quality, points[-1][0].quality
    rows = [
        asdict(of) | {"pgr": recovered(of.quality, student, teacher), "degraded": degraded}
        for of, degraded in points
    ]
    return Measured(student, teacher, rows, completions)
