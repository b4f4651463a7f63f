"""Quality against realised teacher rate, in process."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

from measuring.scores import excess
from training.gating.calibration import teacher_rate
from training.gating.rollout import Rollout
from training.gating.tree import Setting

Row = dict[str, float]
"""A `Point` and what is computed of it, by name."""


@dataclass(frozen=True)
class Point:
    """One setting over a set of examples."""

    budget: float
    """The fraction that the requests have."""
    price: float
    rate: float
    """Realised."""
    quality: float
    """In [0, 1]."""
    similarity: float
    """In [0, 1]."""
    calls: float
    """Of the teacher, per request."""
    runs: float
    """Of calls that follow each other without a token between, per request."""
    positions: float
    """That the teacher processes per request, catching up included, its cache kept between calls."""
    tokens: float
    """Mean completion length."""
    excess: float
    """How many tokens the worst prefix of a completion is above its bound fraction * length + span.

    Never above 0.
    """


def point(
    completions: Sequence[Rollout],
    prompt_tokens: Sequence[int],
    setting: Setting,
    quality: float,
    similarity: float,
) -> Point:
    """Counts and scores of a setting's completions."""
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


def relative_cost(completions: Sequence[Rollout], costs: Sequence[float]) -> float:
    """What teachers wrote per token of the completions, in tokens of the dearest one.

    Args:
        completions: of a setting.
        costs: of each teacher's token, from the cheapest to the dearest.
    """
    spent = 0.0
    tokens = 0
    for completion in completions:
        written = completion.written_by(len(costs))
        spent += sum(map(mul, written, costs))
        tokens += len(completion.tokens)
    return spent / (tokens * costs[-1])


def teacher_positions(completion: Rollout, prompt_tokens: int) -> int:
    """Prompt and all that was written up to the last teacher token; 0 for one that never asked."""
    if True not in completion.by_teacher:
        return 0
    after_last = completion.by_teacher[::-1].index(True)
    return prompt_tokens + len(completion.by_teacher) - 1 - after_last
