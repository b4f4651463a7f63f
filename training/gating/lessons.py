"""Training data of a gate: positions of rollouts, the gain of asking there, and the teacher's view."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from training.gate_config import RatioGain, RegretGain
from training.gating.rollout import ROWS, ClosedLoop, Positions, Request, Rollout, concatenate


@dataclass(frozen=True)
class Trajectories:
    """Positions of many completions, in order of (row, step), as (N, ...) tensors."""

    positions: Positions
    by_teacher: Tensor
    """(N,) whether the teacher wrote the token there."""

    def __len__(self) -> int:
        return len(self.by_teacher)


class Collected(NamedTuple):
    """What some requests gave."""

    trajectories: Trajectories
    completions: list[Rollout]
    """In the order of the requests, as the trajectories' rows."""


def collect(loop: ClosedLoop, requests: Sequence[Request], batch: int = ROWS) -> Collected:
    """The completions of the requests, with what was seen at every position."""
    seen: list[Positions] = []
    completions = loop.write(requests, batch=batch, watch=seen.append)
    joined = concatenate(seen)
    order = (joined.row * loop.max_tokens + joined.step).argsort()
    flags: list[bool] = []
    for completion in completions:
        flags += completion.by_teacher
    ordered = joined.mapped(lambda column: column[order])
    return Collected(Trajectories(ordered, torch.tensor(flags)), completions)


@dataclass(frozen=True)
class Lessons:
    """What a gate is fitted on: N positions, those of a path in one piece."""

    states: Tensor
    """(N, H) the student's."""
    target: Tensor
    """(N,) nats, or points. Of K teachers (N, K), from the cheapest to the dearest."""
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
        rows = []
        first = 0
        for part in parts:
            rows.append(part.row + first)
            first = int(rows[-1].max()) + 1
        columns = {}
        for field in fields(cls):
            columns[field.name] = torch.cat([getattr(part, field.name) for part in parts])
        return replace(cls(**columns), row=torch.cat(rows))

    def where(self, known: Tensor) -> "Lessons":
        """At these positions (N,) only."""
        columns = {}
        for name, column in vars(self).items():
            columns[name] = column[known]
        return Lessons(**columns)


def teacher_view(seen: Positions) -> Tensor:
    """(N, 7): what only the teacher knows of a position.

    How much less it likes the student's token than its own (nats, 0 if they agree; and as a ratio), how much
    it likes both, KL(student, teacher), its entropy.
    """
    lost = regret(seen).clamp(min=0, max=8)
    columns = (lost, (-lost).exp(), seen.surprisal, seen.best, (-seen.best).exp(), seen.kl, seen.entropy)
    return torch.stack(columns, dim=1)


def regret(seen: Positions) -> Tensor:
    """(N,) log p_T(best) - log p_T(own), nats: zero if both agree, small among synonyms."""
    return seen.surprisal - seen.best


def token_gain(config: RegretGain | RatioGain, seen: Positions) -> Tensor:
    """(N,) what asking at a position would gain there.

    (N, K) with K teachers. The dearest one judges the others: a cheaper one gains what its token loses less
    than the student's. That is below 0 if its token is the worse one.
    """
    own = loss(config, regret(seen))
    if not seen.lost.shape[1]:
        return own
    return torch.cat((own[:, None] - loss(config, seen.lost), own[:, None]), dim=1)


def loss(config: RegretGain | RatioGain, lost: Tensor) -> Tensor:
    """What a token loses, as the recipe counts it, by the nats that the teacher likes its own one more."""
    if isinstance(config, RatioGain):
        return (1 - (-lost).exp()).clamp(min=0)
    return lost.clamp(0, config.clip)


class SpanGain(NamedTuple):
    """What a call of several tokens gains."""

    mean: Tensor
    """(N,) or (N, K) over the student's own next tokens."""
    known: Tensor
    """(N,) bool."""


def span_gain(gain: Tensor, row: Tensor, by_teacher: Tensor, span: int) -> SpanGain:
    """Mean over the student's own next `span` tokens of gain, and where it is known.

    A position is known when the student itself wrote every token of the span before its last; spans that run
    over the end of the completion count the missing tokens as zero.

    Args:
        gain: (N,) of one token, or (N, K) of each of K teachers.
        row: (N,) of each position, those of a row in order.
        by_teacher: (N,) who wrote there.
        span: tokens.
    """
    total = gain.clone()
    known = torch.ones_like(by_teacher)
    own = ~by_teacher
    for ahead in range(1, span):
        follows = row[ahead:] == row[:-ahead]
        part = follows if gain.ndim == 1 else follows[:, None]
        total[:-ahead] += torch.where(part, gain[ahead:], 0.0)
        known[:-ahead] &= ~follows | own[ahead - 1 : -1]
    return SpanGain(total / span, known)
