"""The target of `gain: quality`: the expected change of the metric by one teacher token.

The metric of one completion is nearly all noise: the student's state and confidence explain less than one
percent of a token's effect on it. So critics predict this effect, and the gate learns the prediction. A
critic also sees the teacher's distribution, which the gate never sees (an asymmetric critic: Pinto et al.
2017, arXiv 1710.06542).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from training.gating.head import Head
from training.gating.lessons import Lessons

FOLDS = 5
CRITICS = 4
"""Number of critics for each fold, whose predictions are averaged: one alone is noisy."""
EPOCHS = 12
BATCH = 2048
WIDTH = 32


def expected_gain(head: Head, lessons: Lessons, seed: int, known: Tensor | None = None) -> Tensor:
    """(N,) the expectation of the lessons' target if student and teacher differ, and 0 if they agree.

    Each source gets it from critics that were fitted on other sources.

    Args:
        head: computes the gate's features.
        lessons: N positions.
        seed: seed of the critics.
        known: the confidence (N, 10) of the lessons' states; None: it is computed.
    """
    differ = lessons.view[:, 0] > 0
    result = torch.zeros_like(lessons.target)
    if not differ.any():
        return result
    states = lessons.states[differ]
    fold = lessons.source[differ] % FOLDS
    with torch.no_grad():
        confidence = head.confidence(states) if known is None else known[differ].to(head.taps.device)
        own = head.features(states.to(head.taps.device), confidence).cpu()
    x = torch.cat((own, lessons.view[differ]), dim=1)
    x = (x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-3)
    target = lessons.target[differ]
    found = torch.zeros_like(target)
    for held_out in fold.unique().tolist():
        inside = fold != held_out
        if inside.any():
            values = [_fit(x[inside], target[inside], x[~inside], CRITICS * seed + i) for i in range(CRITICS)]
            found[~inside] = torch.stack(values).mean(0)
    result[differ] = found
    return result


def _fit(x: Tensor, target: Tensor, asked: Tensor, seed: int) -> Tensor:
    """Values (M,) at `asked` (M, F) of a critic fitted to x (N, F) and target (N,) by least squares."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critic = nn.Sequential(
            nn.Linear(x.shape[1], WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1)
        )
    optimizer = torch.optim.AdamW(critic.parameters(), lr=2e-3, weight_decay=1e-2, fused=True)
    mean = target.mean()
    scale = target.std(correction=0).clamp(min=1e-3)
    for _ in range(EPOCHS):
        for part in torch.randperm(len(x), generator=generator).split(BATCH):
            loss = mse_loss(critic(x[part]).squeeze(1), (target[part] - mean) / scale)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return critic(asked).squeeze(1) * scale + mean
