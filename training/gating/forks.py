"""Measures the advantage of a teacher token, with its effect until the end of the completion.

The advantage of asking at a position s is

    A(s) = worth of the completion after s and the teacher's token
         - worth of the completion after s and the student's own token

After that token, the student writes alone and greedily. So A is exact, and it is zero if the two models want
the same token. Only positions at which they differ cost rollouts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from training.gating.lessons import Trajectories
from training.gating.rollout import COMPACT, ClosedLoop, Request, Rollout
from training.reading import Stepper
from training.sampling import until_end

Worth = Callable[[Sequence[int], Sequence[list[int]]], Tensor]
"""Computes the worth (N,) of N whole completions, from their rows and tokens."""

Finish = Callable[[Sequence[int], Sequence[list[int]]], list[list[int]]]
"""Finishes N begun completions, from their rows and tokens; the student writes alone and greedily."""


@dataclass(frozen=True)
class Forks:
    """The D of N positions at which the two models differ, and the M completions that go on from them.

    M is less than 2 D: until the teacher writes again, the student's own token leads to the same completion
    from every position.
    """

    positions: Tensor
    """(D,) numbers of the positions at which the models differ."""
    own: list[int]
    """For each of the D positions, number of the completion with the student's next token."""
    theirs: list[int]
    """For each of the D positions, number of the completion with the teacher's next token."""
    rows: list[int]
    """For each of the M completions, the row that it belongs to."""
    begun: list[list[int]]
    """For each of the M completions, its tokens up to the point from which the student writes alone."""

    @classmethod
    def of(cls, trajectories: Trajectories, completions: Sequence[Rollout]) -> "Forks":
        """The forks of some positions, from the completions of their rows."""
        every = trajectories.positions
        differ = (every.own != every.theirs).nonzero().squeeze(1)
        forks = cls(differ, [], [], [], [])
        numbers: dict[tuple[int, int, bool], int] = {}
        columns = torch.stack((every.row, every.step, every.own, every.theirs), dim=1)

        def number(row: int, step: int, is_branch: bool, begun: list[int]) -> int:
            found = numbers.setdefault((row, step, is_branch), len(forks.rows))
            if found == len(forks.rows):
                forks.rows.append(row)
                forks.begun.append(begun)
            return found

        for row, step, own, theirs in columns[differ].tolist():
            path = completions[row]
            before = path.tokens[:step]
            forks.own.append(number(row, path.alone_from(step), False, [*before, own]))
            taken = path.by_teacher[step]
            forks.theirs.append(number(row, step + 1 if taken else step, not taken, [*before, theirs]))
        return forks


def worth_of_asking(
    trajectories: Trajectories, completions: Sequence[Rollout], finish: Finish, worth: Worth
) -> Tensor:
    """(N,) the advantage A at every position, in the unit of `worth`.

    Args:
        trajectories: N positions.
        completions: the completions of the trajectories' rows.
        finish: finishes begun completions of these rows.
        worth: computes the worth of whole completions of these rows.
    """
    forks = Forks.of(trajectories, completions)
    worths = worth(forks.rows, finish(forks.rows, forks.begun))
    total = torch.zeros_like(trajectories.positions.surprisal)
    total[forks.positions] = worths[forks.theirs] - worths[forks.own]
    return total


class Unfinished(NamedTuple):
    """A begun completion that the student has to go on with."""

    number: int
    """Its place among all begun completions."""
    prompt: list[int]
    """Token ids of its prompt."""
    tokens: list[int]
    """Token ids that are written already."""
    room: int
    """Number of tokens that may follow, at least 1."""


def unfinished(
    prompts: Sequence[list[int]], rows: Sequence[int], begun: Sequence[list[int]], end: int, longest: int
) -> list[Unfinished]:
    """Those of the begun completions that neither end with the end token nor are full.

    Args:
        prompts: the prompt of each row, as token ids.
        rows: the row of each begun completion.
        begun: the tokens of each begun completion.
        end: id of the end-of-sequence token.
        longest: most tokens in a completion.
    """
    going = []
    for number, (row, tokens) in enumerate(zip(rows, begun, strict=True)):
        if tokens[-1] != end and len(tokens) < longest:
            going.append(Unfinished(number, prompts[row], tokens, longest - len(tokens)))
    return going


@torch.inference_mode()
def finished(
    loop: ClosedLoop, prompts: Sequence[list[int]], rows: Sequence[int], begun: Sequence[list[int]]
) -> list[list[int]]:
    """The begun completions, each finished by the student alone, which reads equal prompts once.

    Args:
        loop: the pair.
        prompts: the prompt of each row, as token ids.
        rows: the row of each begun completion.
        begun: the tokens of each begun completion.
    """
    whole = list(map(list, begun))
    going = unfinished(prompts, rows, begun, loop.end, loop.max_tokens)
    requests = [Request(each.prompt, begun=each.tokens, max_tokens=each.room) for each in going]
    for together in loop.batches(requests):
        for place, rest in zip(together, _rests(loop, [requests[place] for place in together]), strict=True):
            whole[going[place].number] += rest
    return whole


def _rests(loop: ClosedLoop, requests: Sequence[Request]) -> list[list[int]]:
    """The student's greedy continuation of each request, including the end token."""
    student = Stepper(loop.student)
    prompts = [request.prompt for request in requests]
    reading, mask = student.start(prompts, [request.begun for request in requests], loop.end)
    most = [request.max_tokens for request in requests]
    left = torch.tensor(most, device=loop.student.device)
    alive = torch.arange(len(requests), device=left.device)
    rests: list[list[int]] = [[] for _ in requests]
    while True:
        token = reading.logits[:, : loop.visible].argmax(-1)
        for number, written in zip(alive.tolist(), token.tolist(), strict=True):
            rests[number].append(written)
        left = torch.where(token == loop.end, 0, left - 1)
        going = (left > 0).nonzero().squeeze(1)
        if len(going) == 0:
            break
        if len(going) < COMPACT * len(alive):  # as in the closed loop
            student.keep(going)
            alive, left, token, mask = alive[going], left[going], token[going], mask[going]
        ids = token[:, None]
        mask = torch.cat((mask, torch.ones_like(ids)), dim=1)
        reading = student.step(ids, mask)
    return [until_end(rest, loop.end)[:length] for rest, length in zip(rests, most, strict=True)]
