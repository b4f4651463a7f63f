"""The long-range term of the gate's advantage, measured.

It is what a teacher token at a position changes until the end of the completion:

    A(s) = worth of the completion after s and the teacher's token
         - worth of the completion after s and the student's own token

After that token the student writes alone and greedily. So A is exact, and zero if the two models want the
same token: only positions at which they differ cost rollouts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from training.batches import left_padded
from training.gating.lessons import Trajectories
from training.gating.rollout import COMPACT, ROWS, ClosedLoop, Rollout
from training.reading import Stepper, attends_everywhere
from training.sampling import until_end

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


@torch.inference_mode()
def finished(
    loop: ClosedLoop, prompts: Sequence[list[int]], rows: Sequence[int], begun: Sequence[list[int]]
) -> list[list[int]]:
    """Every begun completion of a row, finished by the student alone, which reads a prompt once for all."""
    whole = list(map(list, begun))
    going = []
    for number, tokens in enumerate(begun):
        if tokens[-1] != loop.end and len(tokens) < loop.max_tokens:
            going.append(number)
    going.sort(key=lambda number: (len(prompts[rows[number]]), rows[number]))
    shared = attends_everywhere(loop.student.config)
    beginnings = []
    for number in going:
        left = loop.max_tokens - len(begun[number])
        beginnings.append(Beginning.of(prompts[rows[number]], begun[number], left, shared))
    for first, last in _batches(loop, beginnings):
        rests = _rests(loop, beginnings[first:last])
        for number, rest in zip(going[first:last], rests, strict=True):
            whole[number] += rest
    return whole


class Beginning(NamedTuple):
    """What comes before a completion's rest."""

    prefix: tuple[int, ...]
    """Is read once for all that begin so."""
    tokens: list[int]
    """After it. In a batch they are padded on the left, so between them and the prefix."""
    left: int
    """Most tokens of the rest."""

    @classmethod
    def of(cls, prompt: list[int], begun: list[int], left: int, shared: bool) -> "Beginning":
        """A sliding window would count padding in between: there is none then, and no prompt is shared."""
        if shared:
            return cls(tuple(prompt), begun, left)
        return cls((*prompt, *begun[:-1]), begun[-1:], left)


def _batches(loop: ClosedLoop, beginnings: Sequence[Beginning]) -> list[tuple[int, int]]:
    """First and last of those that are finished together; the longest prefixes are at the end."""
    batches = []
    last = len(beginnings)
    while last > 0:
        first = max(0, last - min(ROWS, loop.rows_of(len(beginnings[last - 1].prefix))))
        batches.append((first, last))
        last = first
    return batches


def _rests(loop: ClosedLoop, beginnings: Sequence[Beginning]) -> list[list[int]]:
    """What the student writes after each, greedily, the end token with it."""
    student = Stepper(loop.student)
    device = loop.student.device
    prefixes = {prefix: place for place, prefix in enumerate(dict.fromkeys(b.prefix for b in beginnings))}
    ids, mask = left_padded(list(map(list, prefixes)), loop.end, device)
    student.step(ids, mask)
    places = torch.tensor([prefixes[beginning.prefix] for beginning in beginnings], device=device)
    student.keep(places)
    ids, seen = left_padded([beginning.tokens for beginning in beginnings], loop.end, device)
    mask = torch.cat((mask[places], seen), dim=1)
    left = torch.tensor([beginning.left for beginning in beginnings], device=device)
    alive = torch.arange(len(beginnings), device=device)
    rests: list[list[int]] = [[] for _ in beginnings]
    while len(alive) > 0:
        token = student.step(ids, mask).logits[:, : loop.visible].argmax(-1)
        for number, written in zip(alive.tolist(), token.tolist(), strict=True):
            rests[number].append(written)
        left = torch.where(token == loop.end, 0, left - 1)
        going = (left > 0).nonzero().squeeze(1)
        if len(going) < COMPACT * len(alive):  # as in the closed loop
            student.keep(going)
            alive, left, token, mask = alive[going], left[going], token[going], mask[going]
        ids = token[:, None]
        mask = torch.cat((mask, torch.ones_like(ids)), dim=1)
    return [
        until_end(rest, loop.end)[: beginning.left] for rest, beginning in zip(rests, beginnings, strict=True)
    ]
