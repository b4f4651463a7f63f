"""Supervised fine-tuning on the references."""

from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from training.batches import Batch, BatchLoss
from training.method_config import SupervisedConfig
from training.methods.base import Method
from training.models import answer_outputs
from training.pieces import in_pieces


class SFT(Method[SupervisedConfig]):
    """Cross-entropy of the answers' tokens."""

    needs_teacher = False

    def loss(self, model: PreTrainedModel, batch: Batch) -> BatchLoss:
        """The mean cross-entropy of the answers' tokens, in nats."""
        outputs = answer_outputs(model, batch, self.visible)
        targets = batch.targets
        smoothing = self.config.label_smoothing

        def losses(piece: slice) -> Tensor:
            logits = outputs.logits(piece)
            return cross_entropy(logits, targets[piece], label_smoothing=smoothing, reduction="none")

        loss = in_pieces(losses, len(targets), self.visible, self.piece).mean()
        return BatchLoss(loss, {"loss": loss.detach()})
