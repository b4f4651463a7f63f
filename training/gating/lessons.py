"""Training data of a gate: positions of rollouts, with the gain of asking and the teacher's view at each."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from training.gate_config import RatioGain, RegretGain
from training.gating.rollout import ROWS, ClosedLoop, Positions, Request, Rollout, concatenate

KL = 5
ENTROPY = 6
"""Columns of `teacher_view`."""


@dataclass(frozen=True)
class Trajectories:
    """Positions of many completions, in order of (row, step), as (N, ...) tensors."""

    positions: Positions
    by_teacher: Tensor
    """(N,) bool, whether the teacher wrote the token at the position."""

    def __len__(self) -> int:
        return len(self.by_teacher)


class Collected(NamedTuple):
    """The completions of some requests, with their positions."""

    trajectories: Trajectories
    completions: list[Rollout]
    """The completions in the order of the requests, which is that of the trajectories' rows."""


def collect(loop: ClosedLoop, requests: Sequence[Request], batch: int = ROWS) -> Collected:
    """Write the completions of the requests, and record every position.

    Args:
        loop: the pair.
        requests: the requests.
        batch: most requests to write at once.
    """
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
    """N positions that a gate is fitted on. The positions of a path follow each other."""

    states: Tensor
    """(N, H) the student's states."""
    target: Tensor
    """(N,) gain of asking, in nats or points; (N, K) with K teachers, from the cheapest to the dearest."""
    asked: Tensor
    """(N,) bool, whether the teacher wrote the token at the position."""
    row: Tensor
    """(N,) number of the path that the position belongs to."""
    source: Tensor
    """(N,) number of the path's source; all paths from one source have the same number."""
    view: Tensor
    """(N, 7) the teacher's view of the position, see `teacher_view`."""

    def __len__(self) -> int:
        return len(self.target)

    @classmethod
    def join(cls, parts: Sequence["Lessons"]) -> "Lessons":
        """All parts as one, with paths numbered through all parts."""
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
        """The positions selected by `known`, (N,) bool."""
        columns = {}
        for name, column in vars(self).items():
            columns[name] = column[known]
        return Lessons(**columns)


def teacher_view(seen: Positions) -> Tensor:
    """(N, 7) the teacher's view of each position, which the gate never sees.

    The first columns are the regret of the student's token in nats (0 to 8), exp(-regret), and -log p_T of
    the student's token. The others are -log p_T and p_T of the teacher's best token, KL(student, teacher),
    and the teacher's entropy.
    """
    lost = regret(seen).clamp(min=0, max=8)
    columns = (lost, (-lost).exp(), seen.surprisal, seen.best, (-seen.best).exp(), seen.kl, seen.entropy)
    return torch.stack(columns, dim=1)


def regret(seen: Positions) -> Tensor:
    """(N,) log p_T(best) - log p_T(own), in nats: zero if both models agree, small for synonyms."""
    return seen.surprisal - seen.best


def token_gain(config: RegretGain | RatioGain, seen: Positions) -> Tensor:
    """(N,) the gain of asking for one token at each position; (N, K) with K teachers.

    The dearest teacher judges the others. The gain of a cheaper teacher is the loss of the student's token
    minus the loss of the cheaper teacher's token. It is below 0 if the cheaper teacher's token is worse.
    """
    own = loss(config, regret(seen))
    if not seen.lost.shape[1]:
        return own
    return torch.cat((own[:, None] - loss(config, seen.lost), own[:, None]), dim=1)


def loss(config: RegretGain | RatioGain, lost: Tensor) -> Tensor:
    """The loss of a token in the unit of the recipe's gain.

    Args:
        config: the recipe's gain.
        lost: log p_T of the teacher's best token minus that of this token, in nats.
    """
    if isinstance(config, RatioGain):
        return (1 - (-lost).exp()).clamp(min=0)
    return lost.clamp(0, config.clip)


class SpanGain(NamedTuple):
    """The gain of a call of several tokens at N positions."""

    mean: Tensor
    """(N,) or (N, K) mean gain over the student's own next tokens."""
    known: Tensor
    """(N,) bool, whether this mean is known."""


def span_gain(gain: Tensor, row: Tensor, by_teacher: Tensor, span: int) -> SpanGain:
    """Mean gain over the student's own next `span` tokens, and whether it is known.

    It is known if the student wrote every token of the span except perhaps the last. If a span goes beyond
    the end of the completion, the missing tokens count as zero.

    Args:
        gain: (N,) gain of one token, or (N, K) with K teachers.
        row: (N,) row of each position; the positions of a row are in order.
        by_teacher: (N,) bool, whether the teacher wrote the token.
        span: number of tokens in a call.
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
