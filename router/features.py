"""The features that a gate sees at one position: the student's own logits, including the taps.

There are two ways to compute them: compiled loops on a CPU, which take a third of the time there, and
torch's operations on a GPU or for gradients.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from router.feature_layout import LOG_PROB_FLOOR, N_CONFIDENCE, TOP_LOG_PROBS
from router.reserved import ReservedRows

LOWEST = -80.0
"""A logit this far below the largest counts as masked; exp of it is still a normal float32."""
BLOCK = 128
"""Number of logits in each block whose maximum `largest` takes first."""


def n_features(reserved: ReservedRows) -> int:
    """Length F of the vector that `features` returns."""
    return (reserved.count - 1) + N_CONFIDENCE


def features(logits: Tensor, reserved: ReservedRows) -> Tensor:
    """The features of each position: taps, then confidence.

    logits: (..., V) raw logits of the student, V = reserved.end; any float type.
    Returns (..., F) float32.
    """
    if suits_loops(logits):
        return loop("features")(logits, reserved.start, n_features(reserved))
    return torch.cat((logits[..., reserved.taps].float(), confidence(logits, reserved)), dim=-1)


def confidence(logits: Tensor, reserved: ReservedRows) -> Tensor:
    """The confidence features: log-probabilities of the best 8 visible tokens, entropy, margin.

    logits: (..., V) with at least the visible rows.
    Returns (..., 10) float32; log-probabilities and entropy in nats, margin = log p1 - log p2.
    """
    if suits_loops(logits):
        return loop("features")(logits, reserved.start, N_CONFIDENCE)
    visible = logits[..., : reserved.start].float()
    top = largest(visible, TOP_LOG_PROBS)
    uncertainty = Uncertainty.of(visible, top[..., :1])
    log_probs = (top - top[..., :1] - uncertainty.log_total[..., None]).clamp(min=LOG_PROB_FLOOR)
    difference = log_probs[..., :1] - log_probs[..., 1:2]
    return torch.cat((log_probs, uncertainty.entropy[..., None], difference), dim=-1)


def entropy(logits: Tensor, reserved: ReservedRows) -> Tensor:
    """Entropy of the visible tokens' distribution, in nats: (..., V) to (...) float32."""
    if suits_loops(logits):
        return loop("entropy")(logits, reserved.start)
    visible = logits[..., : reserved.start].float()
    return Uncertainty.of(visible, visible.amax(-1, keepdim=True)).entropy


def margin(logits: Tensor, reserved: ReservedRows) -> Tensor:
    """The gap between the two largest visible logits: (..., V) to (...) float32."""
    if suits_loops(logits):
        return loop("margin")(logits, reserved.start)
    top = largest(logits[..., : reserved.start].float(), 2)
    return top[..., 0] - top[..., 1]


def best_probability(logits: Tensor, reserved: ReservedRows) -> Tensor:
    """Probability of the best visible token: (..., V) to (...) float32."""
    if suits_loops(logits):
        return loop("best_probability")(logits, reserved.start)
    return logits[..., : reserved.start].float().softmax(-1).amax(-1)


def suits_loops(logits: Tensor) -> bool:
    """Whether `router.loops` can read the logits: they are on the CPU and need no gradient."""
    return logits.is_cpu and not logits.requires_grad


@cache
def loop(name: str) -> Callable[..., Tensor]:
    """The function of `router.loops` for a feature; imported on first use, as numba takes 70 MiB."""
    from router import loops

    return partial(loops.by_loop, vars(loops)[f"{name}_loop"])


def largest(x: Tensor, k: int) -> Tensor:
    """The k largest of the last dimension, in falling order: (..., V) to (..., k).

    They are in the k blocks with the largest maxima. So one pass over x is enough, and `topk` takes many.
    """
    blocks = x.shape[-1] // BLOCK
    if blocks <= k:
        return x.topk(k, dim=-1).values
    blocked = x[..., : blocks * BLOCK].view(*x.shape[:-1], blocks, BLOCK)
    best = blocked.amax(-1).topk(k, dim=-1, sorted=False).indices
    candidates = blocked.gather(-2, best[..., None].expand(*best.shape, BLOCK)).flatten(-2)
    rest = x[..., blocks * BLOCK :]
    return torch.cat((candidates, rest), dim=-1).topk(k, dim=-1).values


class Uncertainty(NamedTuple):
    """How far a distribution is spread out; both fields are (...) float32, in nats."""

    log_total: Tensor
    """log of the sum of exp(x - largest x): minus the log-probability of the best token."""
    entropy: Tensor

    @classmethod
    def of(cls, x: Tensor, largest: Tensor) -> "Uncertainty":
        """The uncertainty of logits x (..., V) float32; ``largest`` (..., 1) is their maximum.

        Entropy is log sum exp(x) - sum p x, with x taken relative to its maximum. For masked tokens,
        exp(LOWEST) adds nothing to a float32.
        """
        shifted = (x - largest).clamp_(min=LOWEST)
        weights = shifted.exp()
        total = weights.sum(-1)
        log_total = total.log()
        reuse = None if weights.requires_grad else weights
        weighted = torch.mul(weights, shifted, out=reuse).sum(-1)
        return cls(log_total, log_total - weighted / total)
