"""Constrained path consistency for the gate: asking as a policy of its own, with a price for every token.

The problem: maximise E[sum of r - price * c] + T * entropy, where a token of the student's earns r = -gain
and costs nothing, and one of the teacher's earns 0 and costs c = 1. At the optimum, for every price and path
(Nachum et al. 2017, arXiv 1702.08892, with a cost next to the reward):

    C = -U(s_i) + U(s_{i+d}) + sum_j (r_j - price * c_j - T log pi(u_j|s_j)) = 0
    logit pi(ask|s) = (score(s) - price) / T,    U = V - price * V_C

V is the value of the rewards and V_C that of the cost. They share one loss with the score, C^2 / 2, over
prices drawn anew for every batch of paths: so one gate serves all prices, and V_C is what U loses with the
price. The price of the next rollouts follows the realised rate by dual ascent.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from training.gate_config import ConstrainedObjective, GateConfig
from training.gating.fitting import descend
from training.gating.head import Head
from training.gating.lessons import Lessons
from training.methods.pcl import half_square, path_residuals


class PathValues(nn.Module):
    """V and V_C over what the gate sees: features (N, F) -> two of (N,), in nats and in teacher tokens."""

    def __init__(self, head: Head, width: int) -> None:
        super().__init__()
        self.gate = head.gate
        self.mlp = nn.Sequential(nn.Linear(len(head.gate.mean), width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """V and V_C of features (N, F)."""
        return self.mlp((x - self.gate.mean) * self.gate.scale).unbind(-1)


def residuals(
    score: Tensor,
    value: Tensor,
    cost: Tensor,
    asked: Tensor,
    gain: Tensor,
    row: Tensor,
    price: float,
    temperature: float,
    window: int,
) -> Tensor:
    """C of the sub-path of `window` decisions from every position; all arguments (N,), rows in one piece.

    Sub-paths that the end of a row cuts short count too: behind it U is 0.
    """
    logit = (score - price) / temperature
    log_pi = torch.where(asked, logsigmoid(logit), logsigmoid(-logit))
    earned = torch.where(asked, -price, -gain) - temperature * log_pi
    utility = value - price * cost
    after = torch.zeros_like(utility)
    follows = row[window:] == row[:-window]
    after[:-window] = torch.where(follows, utility[window:], 0.0)
    return path_residuals(earned, row, window) + after - utility


class LossTerms(NamedTuple):
    """Of some positions."""

    residual: Tensor
    """(N,) C."""
    value: Tensor
    """(N,) V, nats."""
    cost: Tensor
    """(N,) V_C, teacher tokens."""


def whole_paths(row: Tensor, batch: int) -> list[slice]:
    """Slices of row (N,) between its changes, about `batch` positions each."""
    starts = torch.cat((torch.tensor([True]), row[1:] != row[:-1])).nonzero().squeeze(1)
    cuts = [*starts[:: max(1, batch * len(starts) // len(row))].tolist(), len(row)]
    return list(map(slice, cuts[:-1], cuts[1:]))


def fit_constrained(
    head: Head, lessons: Lessons, config: GateConfig, objective: ConstrainedObjective, seed: int
) -> dict[str, float]:
    """Train head and critic on whole paths, whose target is the gain.

    Returns:
        Means over all positions: the last epoch's `loss`, then `residual`, the absolute one at the prices'
        geometric mean, `value` (nats) and `value_cost` (teacher tokens).
    """
    torch.manual_seed(seed)
    device = head.taps.device
    confidence = head.confidence(lessons.states)
    values = PathValues(head, config.width).to(device)
    slices = whole_paths(lessons.row, config.batch)
    low, high = map(math.log, objective.prices)

    def terms(part: slice, price: float) -> LossTerms:
        x = head.features(lessons.states[part].to(device), confidence[part])
        value, cost = values(x)
        residual = residuals(
            head.gate.score(x),
            value,
            cost,
            lessons.asked[part].to(device),
            lessons.target[part].to(device),
            lessons.row[part].to(device),
            price,
            objective.temperature,
            objective.window,
        )
        return LossTerms(residual, value, cost)

    def loss(part: slice) -> Tensor:
        price = math.exp(low + (high - low) * torch.rand(()).item())
        return half_square(terms(part, price).residual, objective.clip).mean()

    def epoch() -> Iterator[slice]:
        return map(slices.__getitem__, torch.randperm(len(slices)).tolist())

    trained = [*head.parameters(), *values.mlp.parameters()]
    last = descend(trained, len(slices), epoch, loss, config)
    with torch.no_grad():
        parts = [terms(part, math.exp((low + high) / 2)) for part in slices]
    residual, value, cost = map(torch.cat, zip(*parts, strict=True))
    return {
        "loss": last,
        "residual": residual.abs().mean().item(),
        "value": value.mean().item(),
        "value_cost": cost.mean().item(),
    }


def ascended(price: float, realised: float, target: float, rate: float = 1.0) -> float:
    """One multiplicative step of dual ascent: dearer where more was asked than the target, and cheaper."""
    return price * math.exp(rate * (realised - target) / target)
