"""The long-range term of the gate's advantage, measured.

It is what a teacher token at a position changes until the end of the completion:

    A(s) = worth of the completion after s and the teacher's token
         - worth of the completion after s and the student's own token

After that token the student writes alone and greedily. So A is exact, and zero if the two models want the
same token: only positions at which they differ cost rollouts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from training.gating.lessons import Trajectories
from training.gating.rollout import ClosedLoop, Request, Rollout

Worth = Callable[[Sequence[int], Sequence[list[int]]], Tensor]
"""Rows and whole completions (N of both) -> what they are worth (N,)."""


@dataclass(frozen=True)
class Forks:
    """The D of N positions at which the two models differ."""

    positions: Tensor
    """(D,) their numbers."""
    rows: list[int]
    """The rows that they belong to."""
    own: list[list[int]]
    """The completions up to there, with the student's next token."""
    theirs: list[list[int]]
    """The same, with the teacher's."""

    @classmethod
    def of(cls, trajectories: Trajectories, completions: Sequence[Rollout]) -> "Forks":
        """Of the completions of the trajectories' rows."""
        every = trajectories.positions
        differ = (every.own != every.theirs).nonzero().squeeze(1)
        forks = cls(differ, every.row[differ].tolist(), [], [])
        columns = torch.stack((every.row, every.step, every.own, every.theirs), dim=1)
        for row, step, own, theirs in columns[differ].tolist():
            begun = completions[row].tokens[:step]
            forks.own.append([*begun, own])
            forks.theirs.append([*begun, theirs])
        return forks


def worth_of_asking(
    loop: ClosedLoop,
    prompts: Sequence[list[int]],
    trajectories: Trajectories,
    completions: Sequence[Rollout],
    worth: Worth,
) -> Tensor:
    """(N,) A at every position, in the unit of `worth`.

    Args:
        loop: whose student goes on.
        prompts: of the trajectories' rows.
        trajectories: the positions.
        completions: of the trajectories' rows.
        worth: of whole completions.
    """
    forks = Forks.of(trajectories, completions)
    own = worth(forks.rows, finished(loop, prompts, forks.rows, forks.own))
    theirs = worth(forks.rows, finished(loop, prompts, forks.rows, forks.theirs))
    total = torch.zeros_like(trajectories.positions.surprisal)
    total[forks.positions] = theirs - own
    return total


def finished(
    loop: ClosedLoop, prompts: Sequence[list[int]], rows: Sequence[int], begun: Sequence[list[int]]
) -> list[list[int]]:
    """Every begun completion of a row, finished by the student alone."""
    alone = replace(loop, teacher=loop.student)  # nobody looks at what the teacher thinks of it
    whole = list(map(list, begun))
    going = []
    requests = []
    for number, (row, tokens) in enumerate(zip(rows, begun, strict=True)):
        if tokens[-1] != loop.end and len(tokens) < loop.max_tokens:
            going.append(number)
            requests.append(Request(prompts[row] + tokens, max_tokens=loop.max_tokens - len(tokens)))
    for number, completion in zip(going, alone.write(requests), strict=True):
        whole[number] += completion.tokens
    return whole
