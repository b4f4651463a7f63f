"""What a gate sees of one position: the student's own logits, taps included."""

import torch
from torch import Tensor

from router.reserved import ReservedRows

TOP_LOG_PROBS = 8
# A masked token's log-probability is -inf; a feature must be finite.
LOG_PROB_FLOOR = -30.0


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
    log_probs = logits[..., : reserved.start].float().log_softmax(-1)
    top = log_probs.topk(TOP_LOG_PROBS, dim=-1).values.clamp(min=LOG_PROB_FLOOR)
    entropy = torch.special.entr(log_probs.exp()).sum(-1, keepdim=True)
    margin = top[..., :1] - top[..., 1:2]
    return torch.cat((top, entropy, margin), dim=-1)
