"""Word-level distillation: forward KL to the teacher on the references' prefixes (Hinton et al. 2015)."""

from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from training.batches import Batch, BatchLoss
from training.config import KDConfig
from training.methods.base import Method


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(p_T || pi), mean over positions, in nats. Both (N, V) logits."""
    return kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")


class KD(Method[KDConfig]):
    """T^2 KL of both distributions at temperature T, so that gradients keep their size (Hinton et al.)."""

    def loss(self, model: PreTrainedModel, batch: Batch) -> BatchLoss:
        """Mean divergence, nats."""
        pair = self.log_probs(model, batch)
        t = self.config.temperature
        loss = t**2 * forward_kl(pair.student / t, pair.teacher / t)
        return BatchLoss(loss, {"loss": loss.detach()})
