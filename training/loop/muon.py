"""The optimizer Muon, also for CPUs without bfloat16: torch's own takes half a second per matrix there."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from training.parallel import fast_bf16

STEPS = 5
# Coefficients of the quintic that pushes all singular values towards 1 (Jordan et al. 2024).
A = 3.4445
B = -4.7750
C = 2.0315


class Muon(Optimizer):
    """Orthogonalised momentum (Jordan et al. 2024) with Nesterov's step, for matrices (rows, columns).

    Updates have the size of AdamW's updates (Liu et al. 2025, arXiv 2502.16982), so both optimizers share a
    learning rate.
    """

    def __init__(self, params: Iterable[Tensor], weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": 1e-3, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody gives it a closure
        """Update the parameters from their gradients."""
        for group in self.param_groups:
            rate = group["lr"]
            momentum = group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                mean = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = orthogonalised(p.grad.lerp(mean, momentum))
                p.mul_(1 - rate * group["weight_decay"])
                p.add_(update, alpha=-rate * 0.2 * max(p.shape) ** 0.5)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Roughly the nearest matrix with orthonormal rows or columns; its singular values are 0.7 to 1.2."""
    x = matrix.to(torch.bfloat16 if fast_bf16(matrix.device) else torch.float32)
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)  # no singular value above 1
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return (x.T if tall else x).to(matrix.dtype)
