"""Finds the next state after both actions, asking and writing, at every position of some paths.

Under greedy decoding, both next states are known. At most positions both models want the same tokens, and the
next state lies on the path itself. At the others, the student reads the prefix of the next state once more.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from measuring.trajectories import Trajectory
from training.batches import left_padded
from training.gating.lessons import Trajectories
from training.gating.prompts import Prompts
from training.gating.rollout import ClosedLoop, Request, Rollout
from training.reading import Stepper

ENDED = -1
"""Number of the state after the end of a completion."""
TOKENS = 2**14
"""Most tokens that the student reads at once: 512 prefixes of 32 tokens."""


Departures = dict[tuple[int, int], list[int]]
"""Tokens that the teacher would have written, by the (row, step) at which they leave the path."""


class Fork(NamedTuple):
    """A prefix that is not on any path."""

    row: int
    """Row of the path that the prefix leaves."""
    tokens: tuple[int, ...]
    """Tokens of the completion so far."""


@dataclass(frozen=True)
class Branches:
    """The next states of N positions, if the student writes and if the teacher writes.

    A state is a number. Numbers below N are positions, numbers from N on are rows of `states`, and ENDED is
    the state after the end of a completion.
    """

    states: Tensor
    """(D, H) the student's states after prefixes that are not on any path."""
    after_own: Tensor
    """(N,) number of the state after the student's own token."""
    after_call: Tensor
    """(N,) number of the state after the teacher's next tokens."""
    tokens: Tensor
    """(N,) number of these tokens: fewer than `ask_tokens` at the end of a completion."""

    @classmethod
    def join(cls, parts: Sequence["Branches"]) -> "Branches":
        """All parts as one, with positions in the order of `Lessons.join`."""
        positions = sum(len(part.tokens) for part in parts)
        before = 0
        forks_before = 0
        after_own: list[Tensor] = []
        after_call: list[Tensor] = []
        for part in parts:
            size = len(part.tokens)
            for numbers, joined in ((part.after_own, after_own), (part.after_call, after_call)):
                moved = torch.where(
                    numbers < size, numbers + before, numbers - size + positions + forks_before
                )
                joined.append(torch.where(numbers == ENDED, ENDED, moved))
            before += size
            forks_before += len(part.states)
        states = torch.cat([part.states for part in parts])
        tokens = torch.cat([part.tokens for part in parts])
        return cls(states, torch.cat(after_own), torch.cat(after_call), tokens)


def both_ways(
    loop: ClosedLoop,
    prompts: Prompts,
    trajectories: Trajectories,
    completions: Sequence[Rollout],
    ask_tokens: int,
) -> Branches:
    """The branches of all positions; the teacher writes the rest of calls that leave a path.

    Args:
        loop: the pair.
        prompts: the prompts of the trajectories' rows.
        trajectories: the positions.
        completions: the completions of the trajectories' rows.
        ask_tokens: number of tokens in one call.
    """
    tokens = [completion.tokens for completion in completions]
    paths = _Paths.of(tokens, trajectories, loop.end, [loop.max_tokens] * len(tokens))
    teacher = paths.departures(loop, prompts, ask_tokens)
    return paths.branches(teacher, ask_tokens, loop.student, prompts.ids, trajectories)


def one_token_ways(
    student: PreTrainedModel, end: int, served: Sequence[Trajectory], trajectories: Trajectories
) -> Branches:
    """The branches of served completions, for calls of one token, so that no teacher has to write.

    Args:
        student: the student that wrote the completions.
        end: id of the end-of-sequence token.
        served: the completions. Those without an end token were cut off at their longest length.
        trajectories: the positions of the completions.
    """
    tokens = [trajectory.tokens for trajectory in served]
    longest = [sys.maxsize if path[-1] == end else len(path) for path in tokens]
    paths = _Paths.of(tokens, trajectories, end, longest)
    prompts = [trajectory.prompt for trajectory in served]
    return paths.branches(paths.disagreements(), 1, student, prompts, trajectories)


class _Call(NamedTuple):
    state: int
    """Number of the state after the call."""
    tokens: int
    """Number of tokens in the call."""


@dataclass(frozen=True)
class _Paths:
    """Paths, and the forks that leave them."""

    tokens: list[list[int]]
    """The tokens of each row's completion."""
    first: list[int]
    """Number of each row's first position, and last the number of all positions."""
    own: list[int]
    """The student's next token at each position."""
    theirs: list[int]
    """The teacher's next token at each position."""
    end: int
    """Id of the end-of-sequence token."""
    longest: list[int]
    """Most tokens of each row's completion."""
    forks: dict[Fork, int] = field(default_factory=dict)
    """The number of the state after each fork."""

    @classmethod
    def of(
        cls, tokens: list[list[int]], trajectories: Trajectories, end: int, longest: list[int]
    ) -> "_Paths":
        seen = trajectories.positions
        first = [0, *accumulate(map(len, tokens))]
        return cls(tokens, first, seen.own.tolist(), seen.theirs.tolist(), end, longest)

    def branches(
        self,
        teacher: Departures,
        ask_tokens: int,
        student: PreTrainedModel,
        prompts: Sequence[list[int]],
        trajectories: Trajectories,
    ) -> Branches:
        """The branches of all positions; the student reads the forks."""
        own = []
        called = []
        tokens = []
        for row, path in enumerate(self.tokens):
            for step in range(len(path)):
                own.append(self.after_own(row, step))
                call = self.after_call(row, step, ask_tokens, teacher)
                called.append(call.state)
                tokens.append(call.tokens)
        prefixes = [[*prompts[fork.row], *fork.tokens] for fork in self.forks]
        states = states_after(student, self.end, prefixes, trajectories.positions.states)
        return Branches(states, torch.tensor(own), torch.tensor(called), torch.tensor(tokens))

    def disagreements(self) -> Departures:
        """The teacher's next token, at each position at which the path has another."""
        found: Departures = {}
        for row, path in enumerate(self.tokens):
            for step, token in enumerate(path):
                theirs = self.theirs[self.first[row] + step]
                if token != theirs:
                    found[row, step] = [theirs]
        return found

    def departures(self, loop: ClosedLoop, prompts: Prompts, ask_tokens: int) -> Departures:
        """The tokens of a call, at each position at which the path has another token than the teacher's."""
        found = self.disagreements()
        if ask_tokens == 1:
            return found
        going = []
        requests = []
        for (row, step), theirs in found.items():
            if theirs != [self.end]:
                going.append((row, step))
                begun = [*self.tokens[row][:step], *theirs]
                prompt = prompts.ids[row]
                teacher_prompt = prompts.teacher_ids[row]
                requests.append(Request(prompt, -math.inf, 1.0, teacher_prompt, ask_tokens - 1, begun))
        teacher = replace(loop, explore=0.0)
        for place, completion in zip(going, teacher.write(requests), strict=True):
            found[place] += completion.tokens
        return found

    def after_own(self, row: int, step: int) -> int:
        """Number of the state after the student's own token."""
        own = self.own[self.first[row] + step]
        path = self.tokens[row]
        if own == path[step]:
            return self._on_path(row, step + 1)
        return self._forked(row, [*path[:step], own])

    def after_call(self, row: int, step: int, ask_tokens: int, teacher: Departures) -> _Call:
        """The state after a call of the teacher, and the number of tokens in the call."""
        path = self.tokens[row]
        stop = min(step + ask_tokens, self.longest[row])
        for at in range(step, min(stop, len(path))):
            if (row, at) in teacher:
                tokens = [*path[:at], *teacher[row, at]][:stop]
                return _Call(self._forked(row, tokens), len(tokens) - step)
        written = min(stop, len(path))
        return _Call(self._on_path(row, written), written - step)

    def _on_path(self, row: int, step: int) -> int:
        return self.first[row] + step if step < len(self.tokens[row]) else ENDED

    def _forked(self, row: int, tokens: list[int]) -> int:
        if tokens[-1] == self.end or len(tokens) == self.longest[row]:
            return ENDED
        return self.forks.setdefault(Fork(row, tuple(tokens)), self.first[-1] + len(self.forks))


@torch.no_grad()
def states_after(student: PreTrainedModel, end: int, prefixes: Sequence[list[int]], like: Tensor) -> Tensor:
    """The student's states (D, H) after these prefixes, on the CPU.

    Args:
        student: the model that reads.
        end: id of the end-of-sequence token, used to pad.
        prefixes: D lists of token ids.
        like: a tensor (…, H) of the wanted type.
    """
    found = like.new_empty(len(prefixes), like.shape[1])
    numbers: list[int] = []
    for number in sorted(range(len(prefixes)), key=lambda number: len(prefixes[number])):
        if len(prefixes[number]) * (len(numbers) + 1) > TOKENS and numbers:
            found[numbers] = _read(student, end, [prefixes[i] for i in numbers]).to(like)
            numbers = []
        numbers.append(number)
    if numbers:
        found[numbers] = _read(student, end, [prefixes[i] for i in numbers]).to(like)
    return found


def _read(student: PreTrainedModel, end: int, rows: list[list[int]]) -> Tensor:
    """The student's states (rows, H) after the last token of each row."""
    ids, mask = left_padded(rows, end, student.device)
    return Stepper(student).step(ids, mask).states
