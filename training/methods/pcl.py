"""PCL-KD: path consistency learning (Nachum et al. 2017, arXiv 1702.08892) for distillation.

The reward of a token is r = log p_T(a|s). The residual over a sub-path of d decisions, with gamma = T = 1:

    C = -V(s_i) + V(s_{i+d}) + sum_j log p_T(a_j|s_j) - log pi(a_j|s_j),    loss C^2 / 2

Changed here: V = 0, which is its value at the optimum pi = p_T (a learned V collapses: the policy turns
deterministic and V memorises the path's log p_T), and clipped residuals. With `window` 0 the residual is
taken for every action of every position instead of the sampled one, weighted by (pi + p_T) / 2: one step, no
sampling noise, both modes.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from training.batches import Batch, BatchLoss
from training.config import PCLConfig
from training.methods.base import Method


def all_actions_loss(log_pi: Tensor, log_p: Tensor, clip: float) -> Tensor:
    """Half the expected squared one-step residual under (pi + p_T) / 2, mean over positions. Both (N, V)."""
    weights = (log_pi.detach().exp() + log_p.exp()) / 2
    return (weights * half_square(log_p - log_pi, clip)).sum(-1).mean()


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

    @property
    def on_policy(self) -> float:
        """As the recipe says."""
        return self.config.on_policy

    def loss(self, model: PreTrainedModel, batch: Batch) -> BatchLoss:
        """Half the mean squared residual."""
        pair = self.log_probs(model, batch)
        if self.config.window == 0:
            loss = all_actions_loss(pair.student, pair.teacher, self.config.clip)
        else:
            row = batch.answer.nonzero()[:, 0]
            residuals = path_residuals(pair.log_ratio, row, self.config.window)
            loss = half_square(residuals, self.config.clip).mean()
        return BatchLoss(loss, {"loss": loss.detach()})
