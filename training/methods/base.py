"""What a method is: a loss of one batch."""

from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar

import torch
from transformers import PreTrainedModel

from training.batches import Batch, BatchLoss
from training.pieces import PIECE
from training.sampling import MAX_TOKENS, sampled
from training.teacher import Teacher, Views, both

ConfigT = TypeVar("ConfigT")


class Sampler(Protocol):
    """`training.sampling.sampled`, or what stands in for it."""

    def __call__(
        self, model: PreTrainedModel, batch: Batch, visible: int, end: int, *, longest: int
    ) -> Batch:
        """The batch's prompts with the model's own completions."""


class Method(ABC, Generic[ConfigT]):
    """A loss, and what it is taken of.

    Args:
        visible: number of token ids that may be written; the rows after them are the router's.
        end: id of the end of a sequence.
        longest: tokens of the model's own completions.
    """

    needs_teacher = True
    piece = PIECE
    """Logits that may exist at a time, see `training.pieces`."""

    def __init__(
        self,
        config: ConfigT,
        visible: int,
        teacher: Teacher | None,
        end: int = 0,
        longest: int = MAX_TOKENS,
    ) -> None:
        if self.needs_teacher and teacher is None:
            raise ValueError(f"{type(self).__name__} needs a teacher")
        self.config = config
        self.visible = visible
        self._teacher = teacher
        self.end = end
        self.longest = longest
        self.sampler: Sampler = sampled

    @property
    def teacher(self) -> Teacher:
        """Raises ValueError for a method that has none."""
        if self._teacher is None:
            raise ValueError(f"{type(self).__name__} has no teacher")
        return self._teacher

    @property
    def on_policy(self) -> float:
        """Share of the steps on the model's own completions."""
        return 0.0

    def prepare(self, model: PreTrainedModel, batch: Batch) -> Batch:
        """What `loss` is taken of.

        With probability `on_policy` the model's own completions of the batch's prompts, else the batch. All
        processes of a run choose alike.
        """
        if torch.rand(()) >= self.on_policy:
            return batch
        return self.sampler(model, batch, self.visible, self.end, longest=self.longest)

    @abstractmethod
    def loss(self, model: PreTrainedModel, batch: Batch) -> BatchLoss:
        """Scalar to minimise, the mean over the positions of a prepared batch's answers; scalars to log."""

    def views(self, model: PreTrainedModel, batch: Batch) -> Views:
        """Of student and teacher, at the positions of the answers."""
        return both(model, self.teacher, batch, self.visible, self.piece)
