"""Generalised knowledge distillation: a divergence on the student's own text.

See Agarwal et al. 2023, arXiv 2306.13649. The divergence is the generalised Jensen-Shannon divergence, which
`beta` interpolates: 0 is the forward KL, 1 is the reverse KL, as in TRL.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from training.batches import Batch, BatchLoss
from training.method_config import GKDConfig
from training.methods.base import Method
from training.teacher import LogProbs


def generalised_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """(N,) the generalised Jensen-Shannon divergence, in nats.

    It is beta KL(p_T || m) + (1 - beta) KL(pi || m), with m = beta p_T + (1 - beta) pi. At beta 0 it is
    KL(p_T || pi), and at beta 1 it is KL(pi || p_T).

    Args:
        student: (N, V), the student's logits.
        teacher: (N, V), the teacher's logits.
        beta: weight, from 0 to 1.
    """
    log_pi = student.log_softmax(-1)
    log_p = teacher.log_softmax(-1)
    if beta == 0:
        return kl(log_p, log_pi)
    if beta == 1:
        return kl(log_pi, log_p)
    weights = log_p.new_tensor([beta, 1 - beta]).log()
    log_m = torch.logaddexp(log_p + weights[0], log_pi + weights[1])
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_pi, log_m)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """(N,) KL(a || b) in nats, from log-probabilities (N, V)."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


class GKD(Method[GKDConfig]):
    """T^2 times the divergence of both distributions at temperature T, so that gradients keep their size."""

    @property
    def on_policy(self) -> float:
        """Share of the steps that are on the student's own completions, from the recipe."""
        return self.config.on_policy

    def loss(self, model: PreTrainedModel, batch: Batch) -> BatchLoss:
        """The mean divergence times T^2, in nats."""
        t = self.config.temperature

        def divergence(pair: LogProbs) -> Tensor:
            return generalised_jsd(pair.student / t, pair.teacher / t, self.config.beta)

        loss = t**2 * self.views(model, batch).values(divergence).mean()
        return BatchLoss(loss, {"loss": loss.detach()})
