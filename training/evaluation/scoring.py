"""Quality against realised teacher rate, in process."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from measuring.scores import excess
from training.gating.calibration import teacher_rate
from training.gating.rollout import Rollout
from training.gating.tree import Setting


@dataclass(frozen=True)
class Point:
    """One setting over a set of examples.

    budget: fraction asked for; rate: realised; quality, similarity: in [0, 1]; calls, runs: per request, a
    run is of calls that follow each other without a token between; positions: that the teacher processes per
    request, catching up included, its cache kept between calls; tokens: mean completion length; excess:
    tokens by which the worst prefix of a completion lies above its bound fraction * length + span (never
    above 0).
    """

    budget: float
    price: float
    rate: float
    quality: float
    similarity: float
    calls: float
    runs: float
    positions: float
    tokens: float
    excess: float


def point(
    completions: Sequence[Rollout],
    prompt_tokens: Sequence[int],
    setting: Setting,
    quality: float,
    similarity: float,
) -> Point:
    count, span = len(completions), setting.span_tokens if 0 < setting.fraction < 1 else 0
    return Point(
        budget=setting.fraction,
        price=setting.price,
        rate=teacher_rate(completions),
        quality=quality,
        similarity=similarity,
        calls=sum(len(c.starts) for c in completions) / count,
        runs=sum(runs(c) for c in completions) / count,
        positions=sum(map(teacher_positions, completions, prompt_tokens)) / count,
        tokens=sum(len(c.tokens) for c in completions) / count,
        excess=max(excess(c.by_teacher, setting.fraction) for c in completions) - span,
    )


def runs(completion: Rollout) -> int:
    """Stretches of teacher tokens."""
    return sum(now and not before for before, now in pairwise([False, *completion.by_teacher]))


def teacher_positions(completion: Rollout, prompt_tokens: int) -> int:
    """Prompt and all that was written up to the last teacher token; 0 for one that never asked."""
    last = max((at for at, flag in enumerate(completion.by_teacher) if flag), default=None)
    return 0 if last is None else prompt_tokens + last
