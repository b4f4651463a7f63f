"""What a method is: a loss of one batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from training.batches import Batch
from training.sampling import sampled


class Method(ABC):
    """`visible`: number of token ids of the tokenizer; the rows behind them are the router's. `end`: of a
    sequence.
    """

    needs_teacher = True

    def __init__(self, config: Any, visible: int, teacher: PreTrainedModel | None, end: int = 0) -> None:
        if self.needs_teacher and teacher is None:
            raise ValueError(f"{type(self).__name__} needs a teacher")
        self.config, self.visible, self.teacher, self.end = config, visible, teacher, end

    @abstractmethod
    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar to minimise, and scalars to log."""

    def mixed(self, model: PreTrainedModel, batch: Batch, on_policy: float) -> Batch:
        """The model's own completions of the batch's prompts with that probability, else the batch."""
        if torch.rand(()) >= on_policy:
            return batch
        return sampled(model, batch, self.visible, self.end)
