"""How well the scores of a gate agree with what asking gains."""

import torch
from torch import Tensor

from router.gate import Gate, TeachersGate


def score_of(gate: Gate, gain: Tensor) -> Tensor:
    """(N,) what a gate's score would be that knows the gain, (N,) or (N, K)."""
    return gate.common(gain.to(gate.costs)).to(gain) if isinstance(gate, TeachersGate) else gain


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, of two (N,); 0 where one of them does not vary."""
    value = torch.corrcoef(torch.stack((a, b.to(a.dtype))))[0, 1]
    return 0.0 if value.isnan() else value.item()
