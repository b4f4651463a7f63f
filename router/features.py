"""What a gate sees of one position: the student's own logits, taps included."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from router.reserved import ReservedRows

TOP_LOG_PROBS = 8
# A masked token's log-probability is -inf; a feature must be finite.
LOG_PROB_FLOOR = -30.0
LOWEST = -80.0
"""A logit this far below the largest counts as masked; exp of it is still a normal float32."""

MASKED = -1e30
"""A logit that gets no probability, and is finite: nothing becomes NaN because of it."""
BLOCK = 128
"""Logits of which `largest` first takes the maximum."""


def n_features(reserved: ReservedRows) -> int:
    """Length F of the vector that `features` returns."""
    return (reserved.count - 1) + TOP_LOG_PROBS + 2


def features(logits: Tensor, reserved: ReservedRows) -> Tensor:
    """Taps and confidence.

    logits: (..., V) raw logits of the student, V = reserved.end; any float type.
    Returns (..., F) float32.
    """
    return torch.cat((logits[..., reserved.taps].float(), confidence(logits, reserved)), dim=-1)


def confidence(logits: Tensor, reserved: ReservedRows) -> Tensor:
    """Log-probabilities of the best 8 visible tokens, entropy, margin.

    logits: (..., V) with at least the visible rows.
    Returns (..., 10) float32; log-probabilities and entropy in nats, margin = log p1 - log p2.
    """
    with visible_logits(logits, reserved) as visible:
        top = largest(visible, TOP_LOG_PROBS)
        uncertainty = Uncertainty.of(visible, top[..., :1])
    log_probs = (top - top[..., :1] - uncertainty.log_total[..., None]).clamp(min=LOG_PROB_FLOOR)
    margin = log_probs[..., :1] - log_probs[..., 1:2]
    return torch.cat((log_probs, uncertainty.entropy[..., None], margin), dim=-1)


@contextmanager
def visible_logits(logits: Tensor, reserved: ReservedRows) -> Iterator[Tensor]:
    """Logits as float32 (..., W), in which no reserved row counts.

    On a CPU, softmax would copy a part of a row before reading it. So there the reserved rows of the tensor
    itself hold MASKED meanwhile, and get back what they held.
    """
    own = logits.dtype == torch.float32 and logits.is_contiguous() and not logits.requires_grad
    if not own or logits.device.type != "cpu":
        yield logits[..., : reserved.start].float()
        return
    hidden = logits[..., reserved.start :].clone()
    logits[..., reserved.start :] = MASKED
    try:
        yield logits
    finally:
        logits[..., reserved.start :] = hidden


def largest(x: Tensor, k: int) -> Tensor:
    """The k largest of the last dimension, in falling order: (..., V) to (..., k).

    They are within the k blocks with the largest maxima: one pass over x, where `topk` takes many.
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
        """x: (..., V) float32 logits; largest: (..., 1), their maximum.

        Entropy is log sum exp(x) - sum p x, with x taken relative to its maximum.
        """
        if x.device.type == "cpu" and not x.requires_grad:
            quick = cls._quick(x, largest)
            if not quick.entropy.isnan().any():
                return quick
        return cls._careful(x, largest)

    @classmethod
    def _quick(cls, x: Tensor, largest: Tensor) -> "Uncertainty":
        """In three passes over x, of which one computes exponentials; NaN where a token is masked."""
        weights = x.softmax(-1)
        log_total = -weights.amax(-1).log()
        mean = torch.mul(weights, x, out=weights).sum(-1)
        return cls(log_total, largest.squeeze(-1) + log_total - mean)

    @classmethod
    def _careful(cls, x: Tensor, largest: Tensor) -> "Uncertainty":
        """With two tensors of the shape of x. For masked tokens, exp(LOWEST) adds nothing to a float32."""
        shifted = (x - largest).clamp_(min=LOWEST)
        weights = shifted.exp()
        total = weights.sum(-1)
        log_total = total.log()
        reuse = None if weights.requires_grad else weights
        weighted = torch.mul(weights, shifted, out=reuse).sum(-1)
        return cls(log_total, log_total - weighted / total)
