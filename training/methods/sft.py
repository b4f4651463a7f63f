"""Supervised fine-tuning on the references."""

from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from training.batches import Batch, BatchLoss
from training.config import SupervisedConfig
from training.methods.base import Method
from training.models import answer_logits


class SFT(Method[SupervisedConfig]):
    """Cross-entropy of the answers' tokens."""

    needs_teacher = False

    def loss(self, model: PreTrainedModel, batch: Batch) -> BatchLoss:
        """Mean cross-entropy, nats."""
        logits = answer_logits(model, batch, self.visible)
        loss = cross_entropy(logits, batch.targets, label_smoothing=self.config.label_smoothing)
        return BatchLoss(loss, {"loss": loss.detach()})
