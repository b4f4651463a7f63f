"""The rewards of a constrained policy with `gain: quality`: what asking is worth while the policy goes on.

At a position s of a completion, which the policy writes at the price p of its budget and inside its bucket,
the advantage of asking is

    A(s) = worth of the completion after s and the teacher's token
         - worth of the completion after s and the student's own token
         - p * (later teacher tokens of the former - later teacher tokens of the latter)

After this one token, the policy writes both completions. One of them is the completion itself. Both are
exact, because both models are deterministic. With the worth minus p for every teacher token as the return,
A - p is the return of asking minus that of writing. So asking is right if A is above the price, and the
gate's score learns A. Where both models want the same token, A is taken to be 0.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from training.gating.forks import Worth
from training.gating.lessons import Trajectories
from training.gating.rollout import Rollout
from training.gating.tree import Tree, WalkPlan


class Advantages(NamedTuple):
    """The N positions of a policy's completions, and the advantage of asking at each."""

    trajectories: Trajectories
    """The positions; their rows are the numbers of the completions."""
    advantage: Tensor
    """(N,) the advantage of asking, in the unit of the worth."""
    known: Tensor
    """(N,) bool, False if the models differ and the bucket had no room for a call."""
    completions: list[Rollout]
    """The policy's completions."""


class _Fork(NamedTuple):
    """A position at which the models differ."""

    number: int
    """Number of the position."""
    row: int
    """Number of the completion."""
    step: int
    """Number of tokens before the position."""


def advantages(tree: Tree, plans: Sequence[WalkPlan], worth: Worth) -> Advantages:
    """The advantage of asking at each position of the completions that a policy writes.

    Args:
        tree: the tree of the prompts.
        plans: prompt and terms of each completion, without decisions; calls have one token.
        worth: computes the worth of whole completions; its rows are the numbers of the plans.
    """
    completions = tree.write(plans)
    trajectories = _trajectories(tree, plans, completions)
    seen = trajectories.positions
    differ = (seen.own != seen.theirs).nonzero().squeeze(1)
    columns = torch.stack((differ, seen.row[differ], seen.step[differ]), dim=1)
    forks = [_Fork(*numbers) for numbers in columns.tolist()]
    others = []
    for fork in forks:
        *before, decision = completions[fork.row].by_teacher[: fork.step + 1]
        others.append(plans[fork.row]._replace(decisions=[*before, not decision]))
    forked = tree.write(others)
    tokens = [completion.tokens for completion in (*completions, *forked)]
    worths = worth([*range(len(completions)), *(fork.row for fork in forks)], tokens).tolist()
    advantage = torch.zeros(len(seen.row))
    known = torch.ones_like(trajectories.by_teacher)
    for fork, other, found in zip(forks, forked, worths[len(completions) :], strict=True):
        path = completions[fork.row]
        after = fork.step + 1
        further = sum(other.by_teacher[after:]) - sum(path.by_teacher[after:])
        gained = found - worths[fork.row] - max(plans[fork.row].setting.price, 0.0) * further
        asks = path.by_teacher[fork.step]
        advantage[fork.number] = -gained if asks else gained
        known[fork.number] = asks or other.by_teacher[fork.step]
    return Advantages(trajectories, advantage, known, completions)


def _trajectories(tree: Tree, plans: Sequence[WalkPlan], completions: Sequence[Rollout]) -> Trajectories:
    """The positions of the completions."""
    nodes: list[int] = []
    rows: list[int] = []
    steps: list[int] = []
    by_teacher: list[bool] = []
    for row, (plan, completion) in enumerate(zip(plans, completions, strict=True)):
        nodes += tree.path(plan.prompt, completion.tokens)
        rows += [row] * len(completion.tokens)
        steps += range(len(completion.tokens))
        by_teacher += completion.by_teacher
    at = torch.tensor(nodes)
    seen = tree.positions.mapped(lambda column: column[at])
    placed = replace(seen, row=torch.tensor(rows), step=torch.tensor(steps))
    return Trajectories(placed, torch.tensor(by_teacher))
