"""The long-range term of the gate's advantage, measured: what a teacher token at a position changes until the
end of the completion.

    A(s) = sum of gain along the student's own way on from s
         - sum of gain along its way on from s and the teacher's token

Both ways are the student's alone and greedy, so A is exact, and zero where the two models want the same
token: only positions where they differ cost rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from training.gating.gates import Trajectories
from training.gating.rollout import Completion, Cooperation, Positions, Request, concatenate

Gain = Callable[[Positions], Tensor]


def future_gain(
    cooperation: Cooperation,
    prompts: Sequence[list[int]],
    trajectories: Trajectories,
    completions: Sequence[Completion],
    gain: Gain,
) -> Tensor:
    """(N,) A at every position, in nats. prompts, completions: of the trajectories' rows."""
    at = trajectories.positions
    differ = (at.own != at.theirs).nonzero().squeeze(1)
    place = list(
        zip(*(column[differ].tolist() for column in (at.row, at.step, at.own, at.theirs)), strict=True)
    )
    prefixes = [prompts[row] + completions[row].tokens[:step] for row, step, _, _ in place]
    own = [[*prefix, token] for prefix, (_, _, token, _) in zip(prefixes, place, strict=True)]
    theirs = [[*prefix, token] for prefix, (_, _, _, token) in zip(prefixes, place, strict=True)]
    total = torch.zeros_like(at.regret)
    total[differ] = gain(at)[differ] + to_come(cooperation, own, gain) - to_come(cooperation, theirs, gain)
    return total


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
