"""Log-probabilities of student and teacher on a batch, over the same events."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from training.batches import Batch
from training.models import answer_outputs
from training.pieces import PIECE, in_pieces
from training.served import ServedTeacher, ServerError

LEAST = 1e-7  # the least remainder of a sum: below float32's resolution a remainder is noise
SLACK = 0.01  # how far a sum of probabilities may exceed 1, if a server computed it in 16 bits
Teacher: TypeAlias = PreTrainedModel | ServedTeacher


@dataclass(frozen=True)
class LogProbs:
    """Log-probabilities (nats) of the next token at the N positions that predict a batch's answers.

    They are over K events. With a teacher in process, the events are all visible ids. With a served teacher,
    they are its likeliest ids and, as the last event, all other ids together.
    """

    student: Tensor
    """(N, K) the student's, each row normalised."""
    teacher: Tensor
    """(N, K) the teacher's, each row normalised."""
    taken: Tensor
    """(N,) index of the batch's own token among the events."""

    @property
    def log_ratio(self) -> Tensor:
        """(N,) log p_T - log pi of the batch's own tokens."""
        own = self.taken[:, None]
        return (self.teacher.gather(1, own) - self.student.gather(1, own)).squeeze(1)


@dataclass(frozen=True)
class Views:
    """Student and teacher at the N positions that predict a batch's answers, computed piece by piece."""

    positions: int
    """N, the number of positions."""
    width: int
    """Number of logits of one position."""
    piece: int
    """Number of logits that may exist at a time, see `training.pieces`."""
    log_probs: Callable[[slice], LogProbs]
    """Computes the log-probabilities of a slice of the positions; gradients flow to the student only."""

    def values(self, of: Callable[[LogProbs], Tensor]) -> Tensor:
        """The values (N, …) that `of` computes from the log-probabilities, piece by piece."""
        return in_pieces(lambda piece: of(self.log_probs(piece)), self.positions, self.width, self.piece)


def both(model: PreTrainedModel, teacher: Teacher, batch: Batch, visible: int, piece: int = PIECE) -> Views:
    """The views of the student `model` and of its teacher on a batch.

    Args:
        model: the student.
        teacher: in process, or behind a URL.
        batch: the batch whose answers are predicted.
        visible: number of ids that may be written.
        piece: number of logits that may exist at a time.
    """
    student = answer_outputs(model, batch, visible)
    targets = batch.targets

    def log_pi(part: slice) -> Tensor:
        return student.logits(part).float().log_softmax(-1)

    if isinstance(teacher, ServedTeacher):
        answer = teacher.likeliest(batch)
        ids = answer.ids.to(targets.device)
        check_masses(answer.log_probs)
        log_p = remainder(answer.log_probs.to(targets.device))
        taken = (ids == targets[:, None]).int().argmax(1)

        def of_served(part: slice) -> LogProbs:
            return LogProbs(lump(log_pi(part), ids[part]), log_p[part], taken[part])

        return Views(len(targets), visible, piece, of_served)
    with torch.no_grad():
        theirs = answer_outputs(teacher, batch, visible)

    def of_both(part: slice) -> LogProbs:
        with torch.no_grad():
            log_p = theirs.logits(part).float().log_softmax(-1)
        return LogProbs(log_pi(part), log_p, targets[part])

    return Views(len(targets), visible, piece, of_both)


def check_masses(log_probs: Tensor) -> None:
    """Raises ServerError if the probabilities of any row's events (N, K) add up to more than 1."""
    most = float(log_probs.double().exp().sum(-1).max())
    if not most <= 1 + SLACK:
        raise ServerError(f"the teacher gave log-probabilities that add up to a probability of {most:.4g}")


def lump(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities (N, K + 1) of each row's ids (N, K), and of all other ids as one last event.

    Args:
        log_probs: (N, V), over the whole vocabulary.
        ids: (N, K), the ids that stay events of their own.
    """
    none = math.log(
        LEAST / log_probs.shape[1]
    )  # not -inf: gradients stay finite even if no other ids are left
    others = log_probs.scatter(1, ids, none).logsumexp(-1, keepdim=True)
    return torch.cat((log_probs.gather(1, ids), others), dim=1)


def remainder(log_probs: Tensor) -> Tensor:
    """Log-probabilities (N, K) of some events, extended to (N, K + 1) by the event of all other ids."""
    left = (1 - log_probs.double().exp().sum(-1, keepdim=True)).clamp(min=LEAST).log()
    return torch.cat((log_probs, left.to(log_probs.dtype)), dim=1).log_softmax(-1)
