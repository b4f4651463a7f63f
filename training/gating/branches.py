"""The long-range term of the gate's advantage, measured: what a teacher token at a position changes until the
end of the completion.

    A(s) = what becomes of the student's own way on from s and the teacher's token
         - what becomes of its own way on from s

Both ways are the student's alone and greedy, so A is exact, and zero where the two models want the same
token: only positions where they differ cost rollouts. What becomes of a way is counted in the teacher's eyes
(`future_gain`) or by the task's metric (`future_worth`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from training.gating.gates import Trajectories
from training.gating.rollout import Completion, Cooperation, Positions, Request, concatenate

Gain = Callable[[Positions], Tensor]
Worth = Callable[[Sequence[int], Sequence[list[int]]], Tensor]
"""Rows and whole completions (N of both) -> what they are worth (N,)."""


def future_gain(
    cooperation: Cooperation,
    prompts: Sequence[list[int]],
    trajectories: Trajectories,
    completions: Sequence[Completion],
    gain: Gain,
) -> Tensor:
    """(N,) A at every position, in nats. prompts, completions: of the trajectories' rows."""
    at = trajectories.positions
    differ, rows, *both = forks(trajectories, completions)
    own, theirs = (
        to_come(cooperation, [prompts[row] + way for row, way in zip(rows, ways, strict=True)], gain)
        for ways in both
    )
    total = torch.zeros_like(at.regret)
    total[differ] = gain(at)[differ] + own - theirs
    return total


def future_worth(
    cooperation: Cooperation,
    prompts: Sequence[list[int]],
    trajectories: Trajectories,
    completions: Sequence[Completion],
    worth: Worth,
) -> Tensor:
    """(N,) A at every position, in the unit of `worth`. prompts, completions: of the trajectories' rows."""
    differ, rows, *both = forks(trajectories, completions)
    own, theirs = (worth(rows, finished(cooperation, prompts, rows, ways)) for ways in both)
    total = torch.zeros_like(trajectories.positions.regret)
    total[differ] = theirs - own
    return total


def forks(
    trajectories: Trajectories, completions: Sequence[Completion]
) -> tuple[Tensor, list[int], list[list[int]], list[list[int]]]:
    """Where the two models differ (D of N positions): positions (D,), their rows, and the completions up to
    there with the student's next token and with the teacher's.
    """
    at = trajectories.positions
    differ = (at.own != at.theirs).nonzero().squeeze(1)
    rows, steps, own, theirs = (column[differ].tolist() for column in (at.row, at.step, at.own, at.theirs))
    before = [completions[row].tokens[:step] for row, step in zip(rows, steps, strict=True)]
    ways = ([[*way, token] for way, token in zip(before, tokens, strict=True)] for tokens in (own, theirs))
    return differ, rows, *ways


def finished(
    cooperation: Cooperation, prompts: Sequence[list[int]], rows: Sequence[int], ways: Sequence[list[int]]
) -> list[list[int]]:
    """Every begun completion of a row, and the student's own way on to its end."""
    alone = replace(cooperation, teacher=cooperation.student)  # nobody looks at what the teacher thinks of it
    whole, most = [list(way) for way in ways], cooperation.max_tokens
    going = [i for i, way in enumerate(ways) if way[-1] != cooperation.end and len(way) < most]
    rest = alone.write([Request(prompts[rows[i]] + ways[i]) for i in going])
    for i, completion in zip(going, rest, strict=True):
        whole[i] = (whole[i] + completion.tokens)[:most]
    return whole


def to_come(cooperation: Cooperation, prefixes: Sequence[list[int]], gain: Gain) -> Tensor:
    """Sum of gain along the student's own way on from each prefix: (prefixes,)."""
    going = [i for i, prefix in enumerate(prefixes) if prefix[-1] != cooperation.end]
    seen: list[Positions] = []
    cooperation.write([Request(prefixes[i]) for i in going], watch=seen.append)
    total = torch.zeros(len(prefixes))
    if seen:
        positions = concatenate(seen)
        total.index_add_(0, torch.tensor(going)[positions.row], gain(positions))
    return total
