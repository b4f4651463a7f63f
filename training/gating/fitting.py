"""Fits the gate by objective `difference`: its score is a regression on the gain of asking.

The score predicts the gain per teacher token if the teacher writes the next call. At serving time, the score
is compared with a price, which is the Lagrange multiplier of the budget. So one gate serves all budgets.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from training.gate_config import GateConfig
from training.gating.head import Head
from training.gating.lessons import Lessons


def fit(
    head: Head, lessons: Lessons, config: GateConfig, seed: int, known: Tensor | None = None
) -> dict[str, float]:
    """Fit the score to the lessons' target by least squares.

    Args:
        head: taps and gate, which are changed.
        lessons: N positions with their target.
        config: epochs, batch and learning rate.
        seed: seed of the batches' order.
        known: the confidence (N, 10) of the lessons' states; None: it is computed.

    Returns:
        Scalars to log: `loss`, the last epoch's mean.
    """
    device = head.taps.device
    states = lessons.states
    target = lessons.target
    confidence = head.confidence(states) if known is None else known.to(device)
    generator = torch.Generator().manual_seed(seed)

    def loss(chunk: Tensor) -> Tensor:
        x = head.features(states[chunk].to(device), confidence[chunk])
        predicted = head.gate.score(x) if target.ndim == 1 else head.gate.outputs(x)
        return mse_loss(predicted, target[chunk].to(device))

    def epoch() -> Sequence[Tensor]:
        return torch.randperm(len(states), generator=generator).split(config.batch)

    last = descend(list(head.parameters()), -(-len(states) // config.batch), epoch, loss, config)
    return {"loss": last}


Part = TypeVar("Part")


def descend(
    parameters: list[nn.Parameter],
    steps: int,
    epoch: Callable[[], Iterable[Part]],
    loss: Callable[[Part], Tensor],
    config: GateConfig,
) -> float:
    """Run `config.epochs` epochs of AdamW with one cycle of the learning rate.

    Args:
        parameters: the parameters to change.
        steps: number of parts in an epoch.
        epoch: gives the parts of the next epoch, in a new order.
        loss: computes the loss of a part.
        config: epochs, learning rate and weight decay.

    Returns:
        The mean loss of the last epoch.
    """
    # Fused, because a gate is small: most of a step would be the overhead of its dozens of operations.
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    total = config.epochs * steps
    rising = 0.1 if total != 10 else 0.2  # torch divides by one step less than a tenth of 10
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=total, pct_start=rising
    )
    mean = 0.0
    for _ in range(config.epochs):
        losses = []
        for part in epoch():
            value = loss(part)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            losses.append(value.item())
        mean = sum(losses) / len(losses)
    return mean
