"""What a method is: a loss of one batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from training.batches import Batch


class Method(ABC):
    """`visible`: number of token ids of the tokenizer; the rows behind them are the router's."""

    needs_teacher = True

    def __init__(self, config: Any, visible: int, teacher: PreTrainedModel | None) -> None:
        if self.needs_teacher and teacher is None:
            raise ValueError(f"{type(self).__name__} needs a teacher")
        self.config, self.visible, self.teacher = config, visible, teacher

    @abstractmethod
    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar to minimise, and scalars to log."""
