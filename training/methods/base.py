"""What a method is: a loss of one batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from training.batches import Batch
from training.sampling import sampled
from training.teacher import LogProbs, Teacher, both

Sampler = Callable[[PreTrainedModel, Batch, int, int], Batch]
"""`training.sampling.sampled`, or what stands in for it."""


class Method(ABC):
    """`visible`: number of token ids of the tokenizer; the rows behind them are the router's. `end`: of a
    sequence.
    """

    needs_teacher = True

    def __init__(self, config: Any, visible: int, teacher: Teacher | None, end: int = 0) -> None:
        if self.needs_teacher and teacher is None:
            raise ValueError(f"{type(self).__name__} needs a teacher")
        self.config, self.visible, self.teacher, self.end = config, visible, teacher, end
        self.sampler: Sampler = sampled

    def prepare(self, model: PreTrainedModel, batch: Batch) -> Batch:
        """What `loss` is taken of: with probability `on_policy` the model's own completions of the batch's
        prompts, else the batch. All processes of a run choose alike.
        """
        if torch.rand(()) >= getattr(self.config, "on_policy", 0.0):
            return batch
        return self.sampler(model, batch, self.visible, self.end)

    @abstractmethod
    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar to minimise, the mean over the positions of a prepared batch's answers; scalars to log."""

    def log_probs(self, model: PreTrainedModel, batch: Batch) -> LogProbs:
        return both(model, self.teacher, batch, self.visible)
