"""Measures how well the scores of a gate agree with the gain of asking."""

import torch
from torch import Tensor

from router.gate import Gate, TeachersGate


def score_of(gate: Gate, gain: Tensor) -> Tensor:
    """(N,) the score of a gate that knows the gain: (N,), or (N, K) with K teachers."""
    return gate.common(gain.to(gate.costs)).to(gain) if isinstance(gate, TeachersGate) else gain


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of two tensors (N,); 0 if one of them is constant."""
    value = torch.corrcoef(torch.stack((a, b.to(a.dtype))))[0, 1]
    return 0.0 if value.isnan() else value.item()
