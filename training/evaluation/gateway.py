"""Measures a running gateway as its users see it: test sources are sent through OpenAI's own client."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch

from measuring.chats import Source
from measuring.examples import Example, sources_of
from measuring.gateway import GatewayReply
from measuring.scores import recovered
from training.evaluation.scoring import Row, error_of_share, point
from training.gating.calibration import teacher_rate
from training.gating.rollout import Rollout
from training.gating.tree import Setting
from training.tasks import Task

BUDGETS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
"""Fractions to measure unless others are given."""


class Replies(Protocol):
    """A gateway that can be measured."""

    def replies(self, sources: Sequence[Source], budget: float) -> list[GatewayReply]:
        """Greedy replies at a budget, in the order of the sources."""


@dataclass(frozen=True)
class MeasuredGateway:
    """The measurements of a gateway at several budgets."""

    student: float
    """Quality at budget 0."""
    teacher: float
    """Quality at budget 1."""
    rows: list[Row]
    """A row for each budget: a `training.evaluation.scoring.Point`, and four further values.

    These are `pgr`, its standard error `pgr_error`, `settled_rate` and `degraded`. `settled_rate` is the
    teacher rate without the first third of the requests, in which a gate without a calibration learns its
    price. `degraded` is the number of requests that lost their teacher.
    """
    completions: list[list[Rollout]]
    """The completions of each row."""


def measure(
    gateway: Replies, task: Task, examples: list[Example], budgets: Sequence[float], span_tokens: int
) -> MeasuredGateway:
    """Measure a gateway at these budgets, and also at 0 and 1.

    Args:
        gateway: the gateway to measure.
        task: the task that scores the replies.
        examples: the examples to send.
        budgets: fractions of a completion's tokens.
        span_tokens: the span that the gateway's bucket lends, for `excess`.

    Raises:
        GatewayError: the gateway cannot be measured.
    """
    points = []
    qualities = []
    lost = []
    completions = []
    for budget in sorted({0.0, *budgets, 1.0}):
        replies = gateway.replies(sources_of(examples), budget)
        answers = [reply.text for reply in replies]
        scores = task.score(examples, answers)
        completions.append(list(map(completion_of, replies)))
        measured = point(
            completions[-1],
            [reply.prompt_tokens for reply in replies],
            Setting("gateway", 0.0, budget, span_tokens),  # the gateway has its own price, so 0 stands for it
            task.quality(examples, answers, scores.quality),
            sum(scores.similarity) / len(examples),
        )
        points.append(measured)
        qualities.append(torch.tensor(scores.quality))
        lost.append([reply.degraded for reply in replies].count(True))
    student = points[0].quality
    teacher = points[-1].quality
    rows = []
    for number, measured in enumerate(points):
        settled = completions[number][len(examples) // 3 :]
        further = {
            "pgr": recovered(measured.quality, student, teacher),
            "pgr_error": error_of_share(qualities[number], qualities[0], qualities[-1]),
            "settled_rate": teacher_rate(settled),
            "degraded": lost[number],
        }
        rows.append(asdict(measured) | further)
    return MeasuredGateway(student, teacher, rows, completions)


def completion_of(reply: GatewayReply) -> Rollout:
    """The reply as a `Rollout`, to count it like a completion in process."""
    starts = [start for start, _ in reply.spans]
    return Rollout(reply.token_ids, reply.by_teacher, starts)
