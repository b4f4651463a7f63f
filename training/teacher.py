"""The views of a batch that student and teacher have: log-probabilities over the same events."""

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

LEAST = 1e-7  # a remainder below float32's resolution is noise
SLACK = 0.01  # of a sum of probabilities that a server computed in 16 bits
Teacher: TypeAlias = PreTrainedModel | ServedTeacher


@dataclass(frozen=True)
class LogProbs:
    """Of the next token at the N positions that predict a batch's answers, nats.

    The K events are all visible ids if the teacher is in process. Otherwise they are its likeliest ids and,
    last, all others in one.
    """

    student: Tensor
    """(N, K), each row normalised."""
    teacher: Tensor
    """(N, K), each row normalised."""
    taken: Tensor
    """(N,) the batch's own token among the events."""

    @property
    def log_ratio(self) -> Tensor:
        """(N,) log p_T - log pi of the batch's own tokens."""
        own = self.taken[:, None]
        return (self.teacher.gather(1, own) - self.student.gather(1, own)).squeeze(1)


@dataclass(frozen=True)
class Views:
    """Both models at the N positions that predict a batch's answers, a piece of them at a time."""

    positions: int
    width: int
    """Logits of a position."""
    piece: int
    """Logits that may exist at a time, see `training.pieces`."""
    log_probs: Callable[[slice], LogProbs]
    """Of a slice of the positions; gradients flow to the student only."""

    def values(self, of: Callable[[LogProbs], Tensor]) -> Tensor:
        """(N, …) what `of` makes of the log-probabilities."""
        return in_pieces(lambda piece: of(self.log_probs(piece)), self.positions, self.width, self.piece)


def both(model: PreTrainedModel, teacher: Teacher, batch: Batch, visible: int, piece: int = PIECE) -> Views:
    """The student `model` and its teacher."""
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
    """Raises ServerError if some of the events (N, K) are likelier than all of them can be."""
    most = float(log_probs.double().exp().sum(-1).max())
    if not most <= 1 + SLACK:
        raise ServerError(f"the teacher gave log-probabilities that add up to a probability of {most:.4g}")


def lump(log_probs: Tensor, ids: Tensor) -> Tensor:
    """(N, V) over the whole vocabulary -> (N, K + 1): of each row's ids (N, K), and of all others in one."""
    none = math.log(
        LEAST / log_probs.shape[1]
    )  # not -inf: where the ids are all of them, gradients stay finite
    others = log_probs.scatter(1, ids, none).logsumexp(-1, keepdim=True)
    return torch.cat((log_probs.gather(1, ids), others), dim=1)


def remainder(log_probs: Tensor) -> Tensor:
    """(N, K) of some events -> (N, K + 1): what they leave of 1 is the last."""
    left = (1 - log_probs.double().exp().sum(-1, keepdim=True)).clamp(min=LEAST).log()
    return torch.cat((log_probs, left.to(log_probs.dtype)), dim=1).log_softmax(-1)
