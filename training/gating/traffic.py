"""Makes training data for a gate from served completions: both models read them, and neither writes."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from measuring.json_lines import DataError
from measuring.trajectories import Trajectory
from training.gate_config import ConstrainedObjective, GateConfig, QualityGain
from training.gating.branches import Branches, one_token_ways
from training.gating.head import Head
from training.gating.lessons import Lessons, SpanGain, Trajectories, span_gain, teacher_view, token_gain
from training.gating.opinions import Observer
from training.gating.served_forks import ServedForks
from training.loop.progress import console
from training.models import reserved_rows
from training.parallel import device
from training.reading import context_of
from training.teacher import Teacher
from training.tokenizer import visible_ids

HELD_OUT = 10
"""One prompt in this many is held out from a trial fit, to tell how good the gate is on unseen prompts."""
ROWS = 16
"""Number of completions that are read together."""


class Taught(NamedTuple):
    """The training data from some completions, at N positions."""

    lessons: Lessons
    branches: Branches | None
    """The next states of the same positions, for a constrained objective; else None."""
    confidence: Tensor
    """(N, 10) confidence features of the same positions, see `Head.confidence`.

    Computing them takes as long as reading, so all fits share them.
    """

    @classmethod
    def join(cls, parts: Sequence["Taught"]) -> "Taught":
        """All parts as one."""
        branches = [part.branches for part in parts if part.branches is not None]
        lessons = Lessons.join([part.lessons for part in parts])
        confidence = torch.cat([part.confidence for part in parts])
        return cls(lessons, Branches.join(branches) if branches else None, confidence)


@dataclass
class TrafficReader:
    """Makes training data from trajectories."""

    model: PreTrainedModel
    """The student."""
    teacher: Teacher
    tokenizer: PreTrainedTokenizerBase
    config: GateConfig
    seed: int
    cheaper: Sequence[Teacher] = ()
    """The cheaper teachers, from the cheapest to the dearest."""
    forks: ServedForks | None = None
    """Computes the gain `quality`; None with other gains."""
    sources: dict[tuple[int, ...], int] = field(default_factory=dict)
    """Numbers of the prompts so far; equal prompts have the same number."""

    def readable(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """The trajectories that fit into the student's context.

        Raises:
            DataError: fewer than `HELD_OUT` fit, or they have ids that the tokenizer does not have.
        """
        longest = context_of(self.model)
        kept = []
        for trajectory in trajectories:
            if max(*trajectory.prompt, *trajectory.tokens) >= self._visible:
                raise DataError(
                    "the completions have token ids that are not in the tokenizer: from another student?"
                )
            if len(trajectory.prompt) + len(trajectory.tokens) <= longest:
                kept.append(trajectory)
        if len(kept) < HELD_OUT:
            raise DataError(f"{len(kept)} completions to learn from, expected at least {HELD_OUT}")
        return kept

    def taught(self, trajectories: Sequence[Trajectory], most: int) -> Taught:
        """Training data from the completions, or from a random part of them with at most `most` positions."""
        end = self.tokenizer.eos_token_id
        observer = Observer(self.model, self.teacher, self._visible, end, self.cheaper)
        lessons = []
        branches = []
        order = sorted(self._drawn(trajectories, most), key=_length)
        for first in track(range(0, len(order), ROWS), "router: both models read", console=console):
            rows = order[first : first + ROWS]
            sources = [self.sources.setdefault(tuple(row.prompt), len(self.sources)) for row in rows]
            seen = observer.seen(rows)
            lessons.append(self._lessons_of(rows, seen, torch.tensor(sources)))
            if isinstance(self.config.objective, ConstrainedObjective):
                branches.append(one_token_ways(self.model, observer.end, rows, seen))
        joined = Lessons.join(lessons)
        head = Head(self.model, reserved_rows(self.model, self.tokenizer), self.config.width).to(device())
        confidence = head.confidence(joined.states).cpu()
        return Taught(joined, Branches.join(branches) if branches else None, confidence)

    def _drawn(self, trajectories: Sequence[Trajectory], most: int) -> list[Trajectory]:
        """All trajectories, or some at random that have at most `most` tokens together."""
        if sum(len(trajectory.tokens) for trajectory in trajectories) <= most:
            return list(trajectories)
        mixed = random.Random(self.seed).sample(trajectories, len(trajectories))
        drawn = []
        for trajectory in mixed:
            most -= len(trajectory.tokens)
            if most < 0:
                break
            drawn.append(trajectory)
        return drawn

    def _lessons_of(self, rows: Sequence[Trajectory], seen: Trajectories, sources: Tensor) -> Lessons:
        """The lessons from completions of these sources."""
        positions = seen.positions
        target, known = self._gain_of(rows, seen)
        view = teacher_view(positions)
        lessons = Lessons(
            positions.states, target, seen.by_teacher, positions.row, sources[positions.row], view
        )
        return lessons.where(known)

    def _gain_of(self, rows: Sequence[Trajectory], seen: Trajectories) -> SpanGain:
        """The recipe's gain of asking at each position."""
        gain = self.config.gain
        if isinstance(gain, QualityGain):
            if self.forks is None:
                raise ValueError("gain quality needs a gateway that finishes forks")
            return SpanGain(self.forks.worth_of_asking(rows, seen), torch.ones_like(seen.by_teacher))
        positions = seen.positions
        return span_gain(token_gain(gain, positions), positions.row, seen.by_teacher, self.config.ask_tokens)

    @cached_property
    def _visible(self) -> int:
        return visible_ids(self.tokenizer)


def _length(trajectory: Trajectory) -> int:
    return len(trajectory.prompt) + len(trajectory.tokens)
