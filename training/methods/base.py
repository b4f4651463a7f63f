"""The base class of training methods: a method computes the loss of a batch."""

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
    """A function that draws completions, such as `training.sampling.sampled`."""

    def __call__(
        self, model: PreTrainedModel, batch: Batch, visible: int, end: int, *, longest: int
    ) -> Batch:
        """The batch's prompts with the model's own completions."""


class Method(ABC, Generic[ConfigT]):
    """A loss, and the preparation of its batches.

    Args:
        config: the method's part of the recipe.
        visible: number of token ids that may be written; the rows after them are the router's.
        teacher: the teacher; None for a method without one.
        end: id of the end-of-sequence token.
        longest: most tokens in the model's own completions.

    Raises:
        ValueError: the method needs a teacher, and there is none.
    """

    needs_teacher = True
    piece = PIECE
    """Number of logits that may exist at a time, see `training.pieces`."""

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
        """The method's teacher. Raises ValueError if it has none."""
        if self._teacher is None:
            raise ValueError(f"{type(self).__name__} has no teacher")
        return self._teacher

    @property
    def on_policy(self) -> float:
        """Share of the steps that are on the model's own completions."""
        return 0.0

    def prepare(self, model: PreTrainedModel, batch: Batch) -> Batch:
        """The batch to compute `loss` on.

        With probability `on_policy`, it has the model's own completions of the batch's prompts. If not, it is
        the batch itself. All processes of a run make the same choice.
        """
        if torch.rand(()) >= self.on_policy:
            return batch
        return self.sampler(model, batch, self.visible, self.end, longest=self.longest)

    @abstractmethod
    def loss(self, model: PreTrainedModel, batch: Batch) -> BatchLoss:
        """The loss of a prepared batch, as the mean over the positions of its answers, and scalars to log."""

    def views(self, model: PreTrainedModel, batch: Batch) -> Views:
        """The views of student and teacher, at the positions that predict the answers."""
        return both(model, self.teacher, batch, self.visible, self.piece)
