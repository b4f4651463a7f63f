"""Scores and counts of a set of completions: quality, teacher rate, calls and costs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

from torch import Tensor

from measuring.scores import excess
from training.gating.calibration import standard_error, teacher_rate
from training.gating.rollout import Rollout
from training.gating.tree import Setting

Row = dict[str, float]
"""The fields of a `Point`, and values computed from them, by name."""


@dataclass(frozen=True)
class Point:
    """The scores and counts of one setting over a set of examples."""

    budget: float
    """Fraction of the requests' budget."""
    price: float
    rate: float
    """Realised teacher rate."""
    quality: float
    """Quality of the whole set, in [0, 1]."""
    similarity: float
    """Mean edit similarity, in [0, 1]."""
    calls: float
    """Teacher calls per request."""
    runs: float
    """Runs of teacher calls without a student token between them, per request."""
    positions: float
    """Positions that the teacher processes per request, if it keeps its cache between calls.

    They include all tokens that it reads to catch up with the student.
    """
    tokens: float
    """Mean length of the completions, in tokens."""
    excess: float
    """Teacher tokens above the bound fraction * length + span, in the worst prefix of any completion.

    It must not be above 0.
    """


def point(
    completions: Sequence[Rollout],
    prompt_tokens: Sequence[int],
    setting: Setting,
    quality: float,
    similarity: float,
) -> Point:
    """The scores and counts of a setting's completions.

    Args:
        completions: the completion of each example.
        prompt_tokens: number of tokens in each prompt, as the teacher reads it.
        setting: the terms of the completions.
        quality: quality of the whole set.
        similarity: mean edit similarity.
    """
    count = len(completions)
    calls = 0
    runs = 0
    tokens = 0
    excesses = []
    for completion in completions:
        calls += len(completion.starts)
        runs += len(completion.stretches)
        tokens += len(completion.tokens)
        excesses.append(excess(completion.by_teacher, setting.fraction))
    span = setting.span_tokens if 0 < setting.fraction < 1 else 0
    return Point(
        budget=setting.fraction,
        price=setting.price,
        rate=teacher_rate(completions),
        quality=quality,
        similarity=similarity,
        calls=calls / count,
        runs=runs / count,
        positions=sum(map(teacher_positions, completions, prompt_tokens)) / count,
        tokens=tokens / count,
        excess=max(excesses) - span,
    )


def error_of_share(qualities: Tensor, student: Tensor, teacher: Tensor) -> float:
    """Standard error of the share of the gap between student and teacher that is recovered; nan if no gap.

    The share r is a ratio of two means over the same examples. So, by the delta method, its error is that of
    the mean of (quality - student) - r (teacher - student), divided by the gap. For a metric of whole sets,
    the examples' own qualities take its place.

    Args:
        qualities: (examples,) quality of each answer.
        student: (examples,) quality of the student's own answers.
        teacher: (examples,) quality of the teacher's own answers.
    """
    gap = teacher - student
    gained = qualities - student
    size = gap.mean().item()
    if size == 0:
        return math.nan
    return standard_error(gained - gained.mean() / size * gap) / abs(size)


def relative_cost(completions: Sequence[Rollout], costs: Sequence[float]) -> float:
    """Cost of all teachers' tokens per completion token, in tokens of the dearest teacher.

    Args:
        completions: the completions of a setting.
        costs: cost of each teacher's token, from the cheapest to the dearest.
    """
    spent = 0.0
    tokens = 0
    for completion in completions:
        written = completion.written_by(len(costs))
        spent += sum(map(mul, written, costs))
        tokens += len(completion.tokens)
    return spent / (tokens * costs[-1])


def teacher_positions(completion: Rollout, prompt_tokens: int) -> int:
    """Number of positions that the teacher processes: all before its last token; 0 if it was never asked."""
    if True not in completion.by_teacher:
        return 0
    after_last = completion.by_teacher[::-1].index(True)
    return prompt_tokens + len(completion.by_teacher) - 1 - after_last
