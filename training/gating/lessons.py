"""What a gate is fitted on: positions of rollouts, what asking gains there, and what the teacher knows."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from training.gating.config import RatioGain, RegretGain
from training.gating.rollout import ClosedLoop, Positions, Request, Rollout, concatenate


@dataclass(frozen=True)
class Trajectories:
    """Positions of many completions, in order of (row, step), as (N, ...) tensors; see `Positions`.

    by_teacher: (N,) whether the teacher wrote the token there.
    """

    positions: Positions
    by_teacher: Tensor

    def __len__(self) -> int:
        return len(self.by_teacher)


def collect(
    loop: ClosedLoop, requests: Sequence[Request], batch: int = 512
) -> tuple[Trajectories, list[Rollout]]:
    seen: list[Positions] = []
    completions = loop.write(requests, batch=batch, watch=seen.append)
    joined = concatenate(seen)
    order = (joined.row * loop.max_tokens + joined.step).argsort()
    by_teacher = torch.tensor([flag for completion in completions for flag in completion.by_teacher])
    ordered = Positions(**{name: column[order] for name, column in vars(joined).items()})
    return Trajectories(ordered, by_teacher), completions


@dataclass(frozen=True)
class Lessons:
    """What a gate is fitted on: N positions, those of a path in one piece."""

    states: Tensor
    """(N, H) the student's."""
    target: Tensor
    """(N,) nats, or points."""
    asked: Tensor
    """(N,) whether the teacher wrote there."""
    row: Tensor
    """(N,) the path that a position belongs to."""
    source: Tensor
    """(N,) number of the path's source, the same for all paths from it."""
    view: Tensor
    """(N, 7) `teacher_view`."""

    def __len__(self) -> int:
        return len(self.target)

    @classmethod
    def join(cls, parts: Sequence["Lessons"]) -> "Lessons":
        """All of them, their paths numbered on."""
        rows, first = [], 0
        for part in parts:
            rows.append(part.row + first)
            first = int(rows[-1].max()) + 1
        columns = {}
        for field in fields(cls):
            columns[field.name] = torch.cat([getattr(part, field.name) for part in parts])
        return replace(cls(**columns), row=torch.cat(rows))

    def where(self, known: Tensor) -> "Lessons":
        """At these positions (N,) only."""
        return Lessons(*(getattr(self, field.name)[known] for field in fields(self)))


def teacher_view(at: Positions) -> Tensor:
    """(N, 7): what only the teacher knows of a position: how much less it likes the student's token than its
    own (nats, 0 where they agree; and as a ratio), how much it likes both, KL(student, teacher), its entropy.
    """
    lost = regret(at).clamp(min=0, max=8)
    columns = (lost, (-lost).exp(), at.surprisal, at.best, (-at.best).exp(), at.kl, at.entropy)
    return torch.stack(columns, dim=1)


def regret(at: Positions) -> Tensor:
    """(N,) log p_T(best) - log p_T(own), nats: zero if both agree, small among synonyms."""
    return at.surprisal - at.best


def token_gain(config: RegretGain | RatioGain, at: Positions) -> Tensor:
    """(N,) what asking at a position would gain there."""
    if isinstance(config, RatioGain):
        return (1 - (-regret(at)).exp()).clamp(min=0)
    return regret(at).clamp(0, config.clip)


def span_gain(gain: Tensor, trajectories: Trajectories, span: int) -> tuple[Tensor, Tensor]:
    """Mean over the student's own next `span` tokens of gain (N,), and where it is known (N,) bool.

    A position is known when the student itself wrote every token of the span before its last; spans that run
    over the end of the completion count the missing tokens as zero.
    """
    row, step = trajectories.positions.row, trajectories.positions.step
    total, known = gain.clone(), torch.ones_like(trajectories.by_teacher)
    own = ~trajectories.by_teacher
    for ahead in range(1, span):
        follows = (row[ahead:] == row[:-ahead]) & (step[ahead:] == step[:-ahead] + ahead)
        total[:-ahead] += torch.where(follows, gain[ahead:], 0.0)
        known[:-ahead] &= ~follows | own[ahead - 1 : -1]
    return total / span, known
