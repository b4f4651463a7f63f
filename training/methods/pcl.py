"""PCL-KD: path consistency learning (Nachum et al. 2017, arXiv 1702.08892) for distillation.

The reward of a token is r = log p_T(a|s). The residual over a sub-path of d decisions, with gamma = T = 1:

    C = -V(s_i) + V(s_{i+d}) + sum_j log p_T(a_j|s_j) - log pi(a_j|s_j),    loss C^2 / 2

Changed here: V = 0, which is its value at the optimum pi = p_T (a learned V collapses: the policy turns
deterministic and V memorises the path's log p_T), and clipped residuals. With `window` 0 the residual is
taken for every action of every position instead of the sampled one, weighted by (pi + p_T) / 2: one step, no
sampling noise, both modes. A batch holds own completions and references, which one loss sees together.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from training.batches import Batch, BatchLoss
from training.method_config import PCLConfig
from training.methods.base import Method
from training.teacher import LogProbs


def all_actions_loss(log_pi: Tensor, log_p: Tensor, clip: float) -> Tensor:
    """(N,) half the expected squared one-step residual under (pi + p_T) / 2. Both (N, V)."""
    weights = (log_pi.detach().exp() + log_p.exp()) / 2
    return (weights * half_square(log_p - log_pi, clip)).sum(-1)


def path_residuals(log_ratio: Tensor, row: Tensor, window: int) -> Tensor:
    """Sums of `window` consecutive log-ratios log p_T - log pi of one row, for every start; (M,).

    log_ratio, row: (N,) of the taken tokens, and the row each belongs to. Sub-paths that the end of a row
    cuts short count too: after the end the value is 0.
    """
    totals = log_ratio.clone()
    for ahead in range(1, window):
        follows = row[ahead:] == row[:-ahead]
        totals[:-ahead] = totals[:-ahead] + torch.where(follows, log_ratio[ahead:], 0.0)
    return totals


def half_square(residual: Tensor, clip: float) -> Tensor:
    """C^2 / 2, linear beyond |C| = clip (Huber), so that no single residual outweighs a batch."""
    inner = residual.clamp(-clip, clip)
    return inner * (residual - inner / 2)


class PCL(Method[PCLConfig]):
    """Path consistency over sub-paths of `window` decisions."""

    def prepare(self, model: PreTrainedModel, batch: Batch) -> Batch:
        """With the model's own completions in some of the rows: on- and off-policy paths are in one loss.

        The rows are spread evenly from a random one on, so that every row is as often among them, and in all
        processes the same.
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
        """Half the mean squared residual."""
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
