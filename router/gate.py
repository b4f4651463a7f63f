"""Gates: what asking the teacher would be worth at a position, as a score.

A gate asks where its score exceeds the request's price. The learned gate is trained
(`training`), the confidence gates need no training and work with any pair.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

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

    def __init__(self, reserved: ReservedRows, width: int = 64, outputs: int = 1) -> None:
        super().__init__(reserved)
        self.width = width
        size = n_features(reserved)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.mlp = nn.Sequential(
            nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs)
        )

    def forward(self, logits: Tensor) -> Tensor:
        """Scores of the learned network."""
        return self.score(features(logits, self.reserved))

    def score(self, x: Tensor) -> Tensor:
        """x: (..., F) features. Returns (...)."""
        return self.outputs(x).squeeze(-1)

    def outputs(self, x: Tensor) -> Tensor:
        """x: (..., F) features. Returns (..., 1), or as many numbers as the network has outputs."""
        outputs: Tensor = self.mlp((x - self.mean) * self.scale)
        return outputs


class TeachersGate(LearnedGate):
    """A learned gate for several teachers: an output for each says what asking that one is worth.

    A teacher's price is a common price times its cost. The score is the highest common price below which some
    teacher is worth its price. So it is compared with the common price, as the score of any gate.
    """

    costs: Tensor

    def __init__(self, reserved: ReservedRows, width: int, costs: Sequence[float]) -> None:
        """``costs``: of a token of each teacher, in any one unit."""
        super().__init__(reserved, width, len(costs))
        self.register_buffer("costs", torch.tensor(costs), persistent=False)

    def worth(self, logits: Tensor) -> Tensor:
        """logits: (..., V). Returns what asking each of the K teachers is worth, (..., K)."""
        return self.outputs(features(logits, self.reserved))

    def score(self, x: Tensor) -> Tensor:
        """x: (..., F) features. Returns (...)."""
        return self.common(self.outputs(x))

    def common(self, worth: Tensor) -> Tensor:
        """The common price below which one of the teachers is asked; (..., K) to (...)."""
        best = worth.amax(-1)
        return torch.where(best > 0, (worth / self.costs).amax(-1), best)

    def margins(self, worth: Tensor, price: Tensor, least: Tensor | None = None) -> Tensor:
        """What each teacher is worth above its price; the largest one decides, if it is above 0.

        worth: (..., K); price: (...), the common one; least: (..., K), no teacher's price is below it.
        """
        prices = self.prices(price)
        return worth - (prices if least is None else torch.maximum(prices, least))

    def prices(self, price: Tensor) -> Tensor:
        """Of each teacher, by the common price: (...) to (..., K). Below 0, costs do not count."""
        return torch.where(price[..., None] > 0, price[..., None] * self.costs, price[..., None])


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
