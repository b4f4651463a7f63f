"""Supervised fine-tuning on the references."""

from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from training.batches import Batch
from training.config import SFTConfig
from training.methods.base import Method
from training.models import answer_logits


class SFT(Method[SFTConfig]):
    """Cross-entropy of the answers' tokens."""

    needs_teacher = False

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy, nats."""
        logits = answer_logits(model, batch, self.visible)
        loss = cross_entropy(logits, batch.targets, label_smoothing=self.config.label_smoothing)
        return loss, {"loss": loss.detach()}
