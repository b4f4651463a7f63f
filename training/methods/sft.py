"""Supervised fine-tuning on the references."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from training.batches import Batch
from training.methods.base import Method
from training.models import answer_logits


class SFT(Method):
    needs_teacher = False

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits = answer_logits(model, batch, self.visible)
        loss = cross_entropy(logits, batch.targets, label_smoothing=self.config.label_smoothing)
        return loss, {"loss": loss.detach()}
