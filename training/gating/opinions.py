"""Reads finished completions with student and teacher, to compare their distributions at every position.

Each model reads each completion in one pass. The teacher may be a server. Then its likeliest tokens are
known, and all other tokens count as one event.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from measuring.trajectories import Trajectory
from training.batches import Batch
from training.gating.lessons import Trajectories
from training.gating.rollout import Positions
from training.models import Outputs, answer_outputs
from training.pieces import PIECE
from training.served import ServedTeacher
from training.teacher import Teacher, check_masses, remainder


class Opinion(NamedTuple):
    """The teacher's opinion of n positions, in nats."""

    theirs: Tensor
    """(n,) the teacher's likeliest token."""
    best: Tensor
    """(n,) -log p_T of the teacher's likeliest token."""
    surprisal: Tensor
    """(n,) -log p_T of the student's own token; a lower bound of it if a server does not list the token."""
    kl: Tensor
    """(n,) KL(pi || p_T)."""
    entropy: Tensor
    """(n,) entropy of p_T."""
    lost: Tensor
    """(n, K - 1) log p_T of the teacher's likeliest token minus that of each cheaper teacher's token; a lower
    bound of it if a server does not list the cheaper teacher's token.
    """


@dataclass(frozen=True)
class Observer:
    """Reads completions with student and teacher."""

    student: PreTrainedModel
    teacher: Teacher
    visible: int
    """Token ids below this may be written."""
    end: int
    """Id of the end-of-sequence token, used to pad."""
    cheaper: Sequence[Teacher] = ()
    """The cheaper teachers, from the cheapest to the dearest."""

    @torch.no_grad()
    def seen(self, trajectories: Sequence[Trajectory]) -> Trajectories:
        """All positions of some completions, which are read together, in the order of (row, step).

        Raises:
            ServerError: a served teacher cannot be used.
        """
        prompts = [trajectory.prompt for trajectory in trajectories]
        answers = [trajectory.tokens for trajectory in trajectories]
        batch = Batch.of(prompts, answers, self.end).to(self.student.device)
        batch = replace(batch, comes_again=True)  # if the run is resumed
        student = answer_outputs(self.student, batch, self.visible)
        row: list[int] = []
        step: list[int] = []
        flags: list[bool] = []
        for number, trajectory in enumerate(trajectories):
            row += [number] * len(trajectory.tokens)
            step += range(len(trajectory.tokens))
            flags += trajectory.by_teacher
        owns = []
        opinions = []
        cheaper = self._next_tokens(batch)
        for own, opinion in self._opinions(batch, student, cheaper):
            owns.append(own)
            opinions.append(opinion)
        columns = [torch.cat(column) for column in zip(*opinions, strict=True)]
        opinion = Opinion(*columns)
        positions = Positions(
            row=torch.tensor(row),
            step=torch.tensor(step),
            states=student.states.float(),
            own=torch.cat(owns),
            theirs=opinion.theirs,
            surprisal=opinion.surprisal,
            best=opinion.best,
            kl=opinion.kl,
            entropy=opinion.entropy,
            cheaper=cheaper,
            lost=opinion.lost,
        )
        return Trajectories(positions.mapped(Tensor.cpu), torch.tensor(flags))

    def _pieces(self, batch: Batch) -> list[slice]:
        size = max(1, PIECE // self.visible)
        return [slice(first, first + size) for first in range(0, batch.positions, size)]

    def _next_tokens(self, batch: Batch) -> Tensor:
        """(n, K - 1) the next tokens of the cheaper teachers."""
        columns = [torch.empty(batch.positions, 0, dtype=torch.long, device=batch.ids.device)]
        for teacher in self.cheaper:
            if isinstance(teacher, ServedTeacher):
                answer = teacher.likeliest(batch)
                best = answer.ids.gather(1, answer.log_probs.argmax(-1, keepdim=True))
            else:
                outputs = answer_outputs(teacher, batch, self.visible)
                best = torch.cat([outputs.logits(piece).argmax(-1) for piece in self._pieces(batch)])[:, None]
            columns.append(best.to(columns[0]))
        return torch.cat(columns, dim=1)

    def _opinions(self, batch: Batch, student: Outputs, cheaper: Tensor) -> Iterator[tuple[Tensor, Opinion]]:
        """The student's own tokens and the teacher's opinions, piece by piece of the positions."""
        pieces = self._pieces(batch)
        if isinstance(self.teacher, ServedTeacher):
            answer = self.teacher.likeliest(batch)
            check_masses(answer.log_probs)
            for piece in pieces:
                log_pi = student.logits(piece).float().log_softmax(-1)
                own = log_pi.argmax(-1)
                log_probs = answer.log_probs[piece]
                yield own, of_likeliest(log_pi, own, answer.ids[piece], log_probs, cheaper[piece])
            return
        teacher = answer_outputs(self.teacher, batch, self.visible)
        for piece in pieces:
            log_pi = student.logits(piece).float().log_softmax(-1)
            own = log_pi.argmax(-1)
            log_p = teacher.logits(piece).float().log_softmax(-1)
            yield own, of_all(log_pi, own, log_p, cheaper[piece])


def of_all(log_pi: Tensor, own: Tensor, log_p: Tensor, cheaper: Tensor) -> Opinion:
    """The opinion of a teacher whose log-probabilities are all known.

    Args:
        log_pi: (n, V) the student's log-probabilities.
        own: (n,) the student's token.
        log_p: (n, V) the teacher's log-probabilities.
        cheaper: (n, K - 1) the cheaper teachers' tokens.
    """
    best, theirs = log_p.max(-1)
    return Opinion(
        theirs=theirs,
        best=-best,
        surprisal=-log_p.gather(1, own[:, None]).squeeze(1),
        kl=(log_pi.exp() * (log_pi - log_p)).sum(-1),
        entropy=torch.special.entr(log_p.exp()).sum(-1),
        lost=best[:, None] - log_p.gather(1, cheaper),
    )


def of_likeliest(log_pi: Tensor, own: Tensor, ids: Tensor, log_probs: Tensor, cheaper: Tensor) -> Opinion:
    """The opinion of a teacher whose likeliest tokens are known; all other tokens count as one event.

    Args:
        log_pi: (n, V) the student's log-probabilities.
        own: (n,) the student's token.
        ids: (n, K) the teacher's likeliest tokens.
        log_probs: (n, K) their log-probabilities.
        cheaper: (n, M) the tokens of M cheaper teachers.
    """
    ids = ids.to(log_pi.device)
    log_probs = log_probs.to(log_pi.device)
    events = remainder(log_probs)
    best, place = log_probs.max(-1)
    # An unlisted token is at most as likely as the least of the listed tokens, and as all unlisted together.
    least = torch.minimum(log_probs.amin(-1), events[:, -1])
    tokens = torch.cat((own[:, None], cheaper), dim=1)
    same = ids[:, None] == tokens[:, :, None]
    known = torch.where(same, log_probs[:, None], -torch.inf).amax(-1)
    found = torch.where(same.any(-1), known, least[:, None])
    pi = remainder(log_pi.gather(1, ids))  # summing all other ids would take as long as the logits
    return Opinion(
        theirs=ids.gather(1, place[:, None]).squeeze(1),
        best=-best,
        surprisal=-found[:, 0],
        kl=(pi.exp() * (pi - events)).sum(-1),
        entropy=torch.special.entr(events.exp()).sum(-1),
        lost=best[:, None] - found[:, 1:],
    )
