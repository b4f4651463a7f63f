"""PCL-KD: path consistency learning (Nachum et al. 2017, arXiv 1702.08892) for distillation.

The reward of a token is r = log p_T(a|s). With gamma = T = 1, the residual over a sub-path of d decisions is

    C = -V(s_i) + V(s_{i+d}) + sum_j log p_T(a_j|s_j) - log pi(a_j|s_j),    loss C^2 / 2

Changed here: V is 0, its value at the optimum pi = p_T, and residuals are clipped. A learned V collapses: the
policy turns deterministic, and V memorises the path's log p_T. With `window` 0, sub-paths have one step. Each
position then has the residuals of all tokens, weighted by (pi + p_T) / 2, instead of the sampled token's. So
there is no sampling noise, and the modes of both distributions count. A batch has both the student's own
completions and references, for one loss.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from training.batches import Batch, BatchLoss
from training.method_config import PCLConfig
from training.methods.base import Method
from training.teacher import LogProbs


def all_actions_loss(log_pi: Tensor, log_p: Tensor, clip: float) -> Tensor:
    """(N,) half the expected squared one-step residual under (pi + p_T) / 2.

    Args:
        log_pi: (N, V), the student's log-probabilities.
        log_p: (N, V), the teacher's log-probabilities.
        clip: size of a residual, in nats, beyond which the loss grows linearly.
    """
    weights = (log_pi.detach().exp() + log_p.exp()) / 2
    return (weights * half_square(log_p - log_pi, clip)).sum(-1)


def path_residuals(log_ratio: Tensor, row: Tensor, window: int) -> Tensor:
    """(N,) for every position, the sum of the log-ratios of `window` consecutive tokens of its row.

    Sub-paths that the end of a row cuts short count too: after the end, the value is 0.

    Args:
        log_ratio: (N,), log p_T - log pi of the taken tokens.
        row: (N,), the row that each token belongs to.
        window: number of decisions in a sub-path.
    """
    totals = log_ratio.clone()
    for ahead in range(1, window):
        follows = row[ahead:] == row[:-ahead]
        totals[:-ahead] = totals[:-ahead] + torch.where(follows, log_ratio[ahead:], 0.0)
    return totals


def half_square(residual: Tensor, clip: float) -> Tensor:
    """C^2 / 2 of each residual C, linear beyond |C| = clip (Huber): no single one outweighs a batch."""
    inner = residual.clamp(-clip, clip)
    return inner * (residual - inner / 2)


class PCL(Method[PCLConfig]):
    """Path consistency over sub-paths of `window` decisions."""

    def prepare(self, model: PreTrainedModel, batch: Batch) -> Batch:
        """The batch with the model's own completions in a share `on_policy` of its rows.

        So one loss sees paths of the student and of the references. These rows are evenly spaced, with a
        random offset: each row is chosen equally often, and all processes choose the same rows.
        """
        share = self.config.on_policy
        place = torch.rand(()).item()
        own = [
            row for row in range(len(batch.ids)) if int((row + 1) * share + place) > int(row * share + place)
        ]
        if not own:
            return batch
        drawn = self.sampler(model, batch.rows(own), self.visible, self.end, longest=self.longest)
        return batch.replaced(own, drawn, self.end)

    def loss(self, model: PreTrainedModel, batch: Batch) -> BatchLoss:
        """Half the mean squared residual, linear for residuals beyond `clip`."""
        views = self.views(model, batch)
        clip = self.config.clip

        def of_all_actions(pair: LogProbs) -> Tensor:
            return all_actions_loss(pair.student, pair.teacher, clip)

        if self.config.window == 0:
            loss = views.values(of_all_actions).mean()
        else:
            row = batch.answer.nonzero()[:, 0]
            log_ratio = views.values(lambda pair: pair.log_ratio)
            loss = half_square(path_residuals(log_ratio, row, self.config.window), clip).mean()
        return BatchLoss(loss, {"loss": loss.detach()})
