"""Word-level distillation: forward KL to the teacher on the references' prefixes (Hinton et al. 2015)."""

from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from training.batches import Batch, BatchLoss
from training.method_config import KDConfig
from training.methods.base import Method
from training.teacher import LogProbs


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """(N,) KL(p_T || pi) in nats, from logits (N, V) of student and teacher."""
    divergence = kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none")
    return divergence.sum(-1)


class KD(Method[KDConfig]):
    """T^2 times the KL at temperature T, so that gradients keep their size (Hinton et al. 2015)."""

    def loss(self, model: PreTrainedModel, batch: Batch) -> BatchLoss:
        """The mean divergence times T^2, in nats."""
        t = self.config.temperature

        def divergence(pair: LogProbs) -> Tensor:
            return forward_kl(pair.student / t, pair.teacher / t)

        loss = t**2 * self.views(model, batch).values(divergence).mean()
        return BatchLoss(loss, {"loss": loss.detach()})
