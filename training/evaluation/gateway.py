"""A running gateway, measured as its users see it: held-out sources through OpenAI's own client."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from measuring.chats import Source
from measuring.examples import Example, sources_of
from measuring.gateway import GatewayReply
from measuring.scores import recovered
from training.evaluation.scoring import Row, point
from training.gating.calibration import teacher_rate
from training.gating.rollout import Rollout
from training.gating.tree import Setting
from training.tasks import Task

BUDGETS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)


class Replies(Protocol):
    """What is measured: replies at a budget."""

    def replies(self, sources: Sequence[Source], budget: float) -> list[GatewayReply]:
        """Greedy, in the order of the sources."""


@dataclass(frozen=True)
class MeasuredGateway:
    """A gateway at several budgets."""

    student: float
    """Quality at budget 0."""
    teacher: float
    """Quality at budget 1."""
    rows: list[Row]
    """Of all budgets: see `training.evaluation.scoring.Point`, with `pgr`, `settled_rate` and `degraded`.

    `settled_rate` is the teacher rate of the requests after the first third, in which a gate without a
    calibration learns its price. `degraded` is the number of requests that lost their teacher.
    """
    completions: list[list[Rollout]]
    """Of each row."""


def measure(
    gateway: Replies, task: Task, examples: list[Example], budgets: Sequence[float], span_tokens: int
) -> MeasuredGateway:
    """Rows at these budgets and at 0 and 1.

    Args:
        gateway: what is measured.
        task: scores the replies.
        examples: of the task.
        budgets: fractions of a completion's tokens.
        span_tokens: what the gateway's bucket lends, for `excess`.

    Raises:
        GatewayError: the gateway cannot be measured.
    """
    points = []
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
            Setting("gateway", 0.0, budget, span_tokens),  # its price is its own
            task.quality(examples, answers, scores.quality),
            sum(scores.similarity) / len(examples),
        )
        points.append(measured)
        lost.append([reply.degraded for reply in replies].count(True))
    student = points[0].quality
    teacher = points[-1].quality
    rows = []
    for measured, degraded, written in zip(points, lost, completions, strict=True):
        share = recovered(measured.quality, student, teacher)
        settled = teacher_rate(written[len(written) // 3 :])
        rows.append(asdict(measured) | {"pgr": share, "settled_rate": settled, "degraded": degraded})
    return MeasuredGateway(student, teacher, rows, completions)


def completion_of(reply: GatewayReply) -> Rollout:
    """The reply, as completions in process are counted."""
    starts = [start for start, _ in reply.spans]
    return Rollout(reply.token_ids, reply.by_teacher, starts)
