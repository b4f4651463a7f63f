"""Gates: what asking the teacher would be worth at a position, as a score.

A gate asks where its score exceeds the request's price. The learned gate is trained
(`training`), the confidence gates need no training and work with any pair.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from router.features import Uncertainty, features, largest, n_features, visible_logits
from router.reserved import ReservedRows


class Gate(nn.Module, ABC):
    """Scores positions; every gate shares this signature and differs in nothing else."""

    def __init__(self, reserved: ReservedRows) -> None:
        super().__init__()
        self.reserved = reserved

    @abstractmethod
    def forward(self, logits: Tensor) -> Tensor:
        """logits: (..., V) raw student logits. Returns the score (...), float32."""


class LearnedGate(Gate):
    """MLP over `router.features`; its score is the predicted value of asking, per teacher token."""

    mean: Tensor
    scale: Tensor

    def __init__(self, reserved: ReservedRows, width: int = 64) -> None:
        super().__init__(reserved)
        self.width = width
        size = n_features(reserved)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.mlp = nn.Sequential(
            nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, logits: Tensor) -> Tensor:
        """Scores of the learned network."""
        return self.score(features(logits, self.reserved))

    def score(self, x: Tensor) -> Tensor:
        """x: (..., F) features. Returns (...)."""
        scores: Tensor = self.mlp((x - self.mean) * self.scale)
        return scores.squeeze(-1)


class RandomGate(Gate):
    """Uniform in [0, 1): asks with probability 1 - price."""

    def forward(self, logits: Tensor) -> Tensor:
        """Scores without a look at the logits."""
        return torch.rand(logits.shape[:-1], device=logits.device)


class EntropyGate(Gate):
    """Entropy of the next token, in nats."""

    def forward(self, logits: Tensor) -> Tensor:
        """The entropy of the visible tokens, in nats."""
        with visible_logits(logits, self.reserved) as visible:
            return Uncertainty.of(visible, visible.amax(-1, keepdim=True)).entropy


class MarginGate(Gate):
    """Minus the logit gap between the best two tokens (= minus the gap of their log-probabilities)."""

    def forward(self, logits: Tensor) -> Tensor:
        """Minus the distance of the two highest logits."""
        top = largest(logits[..., : self.reserved.start].float(), 2)
        return top[..., 1] - top[..., 0]


class MaxProbabilityGate(Gate):
    """Minus the probability of the best token."""

    def forward(self, logits: Tensor) -> Tensor:
        """Minus the probability of the best token."""
        with visible_logits(logits, self.reserved) as visible:
            return -visible.softmax(-1).amax(-1)


CONFIDENCE_GATES: dict[str, type[Gate]] = {
    "random": RandomGate,
    "entropy": EntropyGate,
    "margin": MarginGate,
    "max_probability": MaxProbabilityGate,
}
GATES: dict[str, type[Gate]] = {"learned": LearnedGate, **CONFIDENCE_GATES}
