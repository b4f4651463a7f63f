"""Word-level distillation: forward KL to the teacher on the references' prefixes (Hinton et al. 2015)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from training.batches import Batch
from training.methods.base import Method


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(p_T || pi), mean over positions, in nats. Both (N, V) logits."""
    return kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")


class KD(Method):
    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        of = self.log_probs(model, batch)
        loss = forward_kl(of.student, of.teacher)
        return loss, {"loss": loss.detach()}
