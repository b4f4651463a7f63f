"""The gain `quality` of completions that a gateway wrote: it finishes their forks, with the student alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from measuring.trajectories import Trajectory
from training.gating.forks import room_left, worth_of_asking
from training.gating.judge import TEMPERATURE, Draw, Judge, in_groups
from training.gating.lessons import Trajectories
from training.gating.rollout import Rollout
from training.running_gateway import RunningGateway
from training.sampling import complete
from training.served import ServedTeacher
from training.served_completions import completed
from training.teacher import Teacher
from training.teacher_cache import TeacherCache, key_of

TOGETHER = 64
"""Completions that a served teacher draws at once."""


@dataclass(frozen=True)
class ServedForks:
    """Of the prompts of a judge."""

    gateway: RunningGateway
    judge: Judge
    numbers: Mapping[tuple[int, ...], int]
    """Of the judge's examples, by their prompts."""
    kept: "KeptTokens"
    student: str
    """Fingerprint of its weights."""
    end: int
    """Id of the end of a sequence."""
    max_tokens: int
    """Longest completion."""

    def worth_of_asking(self, served: Sequence[Trajectory], seen: Trajectories) -> Tensor:
        """(N,) what a teacher token changes at every position, in points of 100.

        Args:
            served: completions.
            seen: their N positions.

        Raises:
            GatewayError: the gateway cannot be used.
            ServerError: the teacher's server cannot be used.
        """
        completions = [Rollout(each.tokens, each.by_teacher) for each in served]
        numbers = [self.numbers[tuple(each.prompt)] for each in served]

        def worth(rows: Sequence[int], whole: Sequence[list[int]]) -> Tensor:
            return self.judge.worth([numbers[row] for row in rows], whole)

        prompts = [each.prompt for each in served]
        return worth_of_asking(seen, completions, partial(self.finished, prompts), worth)

    def finished(
        self, prompts: Sequence[list[int]], rows: Sequence[int], begun: Sequence[list[int]]
    ) -> list[list[int]]:
        """Every begun completion of a prompt, finished."""
        going = [place for place in range(len(rows)) if self._room(begun[place])]
        read = [[*prompts[rows[place]], *begun[place]] for place in going]
        rooms = [self._room(begun[place]) for place in going]

        def write(missing: list[int]) -> list[list[int]]:
            return self.gateway.rests([read[i] for i in missing], [rooms[i] for i in missing])

        keys = [key_of("rest", self.student, *pair) for pair in zip(rooms, read, strict=True)]
        whole = list(map(list, begun))
        for place, rest in zip(going, self.kept.of(keys, write), strict=True):
            whole[place] += rest
        return whole

    def _room(self, begun: list[int]) -> int:
        return room_left(begun, self.end, self.max_tokens)


@dataclass(frozen=True)
class KeptTokens:
    """Token ids that a run goes on with after a stop."""

    cache: TeacherCache

    def of(self, keys: Sequence[bytes], write: Callable[[list[int]], list[list[int]]]) -> list[list[int]]:
        """Those of each key; `write` gives those whose places are missing."""
        found = []
        missing = []
        for place, value in enumerate(self.cache.get(keys)):
            found.append([] if value is None else np.frombuffer(value, dtype=np.int32).tolist())
            if value is None:
                missing.append(place)
        if missing:
            new = {}
            for place, tokens in zip(missing, write(missing), strict=True):
                found[place] = tokens
                new[keys[place]] = np.array(tokens, dtype=np.int32).tobytes()
            self.cache.put(new)
        return found


def drawn_by(teacher: Teacher, kept: KeptTokens, *, visible: int, end: int, longest: int) -> Draw:
    """By a teacher that reads what a gateway wrote.

    Args:
        teacher: in process, or behind a URL.
        kept: keeps its completions.
        visible: token ids below this may be written.
        end: id of the end of a sequence.
        longest: tokens of a completion.
    """

    def write(prompts: list[list[int]]) -> list[list[int]]:
        if not isinstance(teacher, ServedTeacher):
            return complete(teacher, prompts, visible, end, longest, TEMPERATURE)
        rows = []
        for first in range(0, len(prompts), TOGETHER):
            part = prompts[first : first + TOGETHER]
            rows += completed(
                teacher.server, part, visible=visible, end=end, longest=longest, temperature=TEMPERATURE
            )
        return rows

    def draw(prompts: list[list[int]], count: int) -> list[list[list[int]]]:
        repeated = [prompt for prompt in prompts for _ in range(count)]
        keys = []
        for place, prompt in enumerate(repeated):
            keys.append(key_of("drawn", *identity, longest, place % count, prompt))
        return in_groups(kept.of(keys, lambda missing: write([repeated[i] for i in missing])), count)

    identity = identity_of(teacher)
    return draw


def identity_of(teacher: Teacher) -> list[object]:
    """JSON values that another teacher does not have."""
    if isinstance(teacher, ServedTeacher):
        return [teacher.known_as, teacher.model]
    return [parameter.double().sum().item() for parameter in teacher.parameters()]
