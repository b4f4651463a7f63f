"""Computes the gain `quality` of completions that a gateway wrote; its student also finishes their forks."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from measuring.trajectories import Trajectory
from training.gating.forks import unfinished, worth_of_asking
from training.gating.judge import TEMPERATURE, Draw, Judge
from training.gating.lessons import Trajectories
from training.gating.rollout import Rollout
from training.kept_tokens import KeptTokens
from training.running_gateway import RunningGateway
from training.sampling import complete
from training.served import ServedTeacher
from training.served_completions import completed
from training.teacher import Teacher
from training.teacher_cache import key_of

TOGETHER = 64
"""Number of completions that a served teacher draws in one request."""


@dataclass(frozen=True)
class ServedForks:
    """The forks of completions by a gateway, whose worth a judge computes."""

    gateway: RunningGateway
    judge: Judge
    numbers: Mapping[tuple[int, ...], int]
    """Numbers of the judge's examples, by their prompts as token ids."""
    kept: KeptTokens
    """Keeps finished completions for a resumed run."""
    student: str
    """Fingerprint of the student's weights."""
    end: int
    """Id of the end-of-sequence token."""
    max_tokens: int
    """Longest completion, in tokens."""

    def worth_of_asking(self, served: Sequence[Trajectory], seen: Trajectories) -> Tensor:
        """(N,) change of the completion's worth by a teacher token at every position, in points of 100.

        Args:
            served: the completions.
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
        """The begun completions, each finished by the gateway's student alone.

        Args:
            prompts: the prompt of each row, as token ids.
            rows: the row of each begun completion.
            begun: the tokens of each begun completion.
        """
        going = unfinished(prompts, rows, begun, self.end, self.max_tokens)
        read = [[*each.prompt, *each.tokens] for each in going]

        def write(missing: list[int]) -> list[list[int]]:
            return self.gateway.rests([read[i] for i in missing], [going[i].room for i in missing])

        keys = [key_of("rest", self.student, each.room, ids) for each, ids in zip(going, read, strict=True)]
        whole = list(map(list, begun))
        for each, rest in zip(going, self.kept.of(keys, write), strict=True):
            whole[each.number] += rest
        return whole


def drawn_by(teacher: Teacher, kept: KeptTokens, *, visible: int, end: int, longest: int) -> Draw:
    """A function that draws completions from a teacher, and keeps them.

    Args:
        teacher: a teacher in process, or behind a URL.
        kept: keeps the drawn completions.
        visible: token ids below this may be written.
        end: id of the end-of-sequence token.
        longest: most tokens in a completion.
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

    def draw(prompts: list[list[int]]) -> list[list[int]]:
        times: Counter[tuple[int, ...]] = Counter()
        keys = []
        for prompt in prompts:
            keys.append(key_of("drawn", *identity, longest, times[tuple(prompt)], prompt))
            times[tuple(prompt)] += 1
        return kept.of(keys, lambda missing: write([prompts[i] for i in missing]))

    identity = identity_of(teacher)
    return draw


def identity_of(teacher: Teacher) -> list[object]:
    """JSON values that identify a teacher."""
    if isinstance(teacher, ServedTeacher):
        return [teacher.known_as, teacher.model]
    return [parameter.double().sum().item() for parameter in teacher.parameters()]
