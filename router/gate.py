"""Gates: a score for how much asking the teacher would help at a position.

A gate asks at positions whose score exceeds the request's price. The learned gate is trained by
`training`. The confidence gates need no training and work with any pair.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from router.features import best_probability, entropy, features, margin, n_features
from router.reserved import ReservedRows


class Gate(nn.Module, ABC):
    """A module that scores positions. All gates have this interface."""

    def __init__(self, reserved: ReservedRows) -> None:
        super().__init__()
        self.reserved = reserved

    @abstractmethod
    def forward(self, logits: Tensor) -> Tensor:
        """Scores (...) float32 from the student's raw logits (..., V)."""

    def freeze(self) -> Self:
        """Prepare the gate for serving on its current device. Its tensors must not change afterwards."""
        return self


class Layer(NamedTuple):
    """A linear layer's tensors, without the module, which looks up hooks and names at every step."""

    weight: Tensor
    """(outputs, inputs)."""
    bias: Tensor


class LearnedGate(Gate):
    """MLP over `router.features`; its score is the predicted value of asking, per teacher token."""

    mean: Tensor
    """(F,), subtracted from the features."""
    scale: Tensor
    """(F,), factor of the features after that."""

    def __init__(self, reserved: ReservedRows, width: int = 64, outputs: int = 1) -> None:
        super().__init__(reserved)
        self.width = width
        self._frozen: list[Layer] = []
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
        """Scores (...) of features x (..., F)."""
        return self.outputs(x).squeeze(-1)

    def outputs(self, x: Tensor) -> Tensor:
        """The network's outputs (..., K) for features x (..., F); K is 1 unless there are several outputs."""
        if not self._frozen:
            outputs: Tensor = self.mlp((x - self.mean) * self.scale)
            return outputs
        *hidden, last = self._frozen
        for layer in hidden:
            x = functional.silu(functional.linear(x, layer.weight, layer.bias), inplace=True)
        return functional.linear(x, last.weight, last.bias)

    def freeze(self) -> Self:
        """See `Gate.freeze`. The normalisation becomes a part of the first layer."""
        layers = [layer for layer in self.mlp if isinstance(layer, nn.Linear)]
        frozen = [Layer(layer.weight.detach(), layer.bias.detach()) for layer in layers]
        weight = frozen[0].weight * self.scale
        frozen[0] = Layer(weight, frozen[0].bias - weight @ self.mean)
        self._frozen = frozen
        return self


class TeachersGate(LearnedGate):
    """A learned gate for several teachers, with a score for each.

    A teacher's price is a common price times its cost. The score is the highest common price below which some
    teacher is worth its price. So it is compared with the common price, like the score of any gate.
    """

    costs: Tensor
    """(K,), cost of a token of each teacher."""

    def __init__(self, reserved: ReservedRows, width: int, costs: Sequence[float]) -> None:
        """``costs``: cost of a token of each teacher, in any one unit."""
        super().__init__(reserved, width, len(costs))
        self.register_buffer("costs", torch.tensor(costs), persistent=False)

    def worth(self, logits: Tensor) -> Tensor:
        """What asking each of the K teachers is worth (..., K), from logits (..., V)."""
        return self.outputs(features(logits, self.reserved))

    def score(self, x: Tensor) -> Tensor:
        """Scores (...) of features x (..., F)."""
        return self.common(self.outputs(x))

    def common(self, worth: Tensor) -> Tensor:
        """The common price below which one of the teachers is asked; (..., K) to (...)."""
        best = worth.amax(-1)
        return torch.where(best > 0, (worth / self.costs).amax(-1), best)

    def margins(self, worth: Tensor, price: Tensor, least: Tensor | None = None) -> Tensor:
        """What each teacher is worth above its price, (..., K). The largest margin above 0 decides.

        worth: (..., K); price: (...), the common price; least: (..., K), lower bounds of all prices.
        """
        prices = self.prices(price)
        return worth - (prices if least is None else torch.maximum(prices, least))

    def prices(self, price: Tensor) -> Tensor:
        """Each teacher's price from the common price, (...) to (..., K). Below 0, costs do not count."""
        return torch.where(price[..., None] > 0, price[..., None] * self.costs, price[..., None])


class RandomGate(Gate):
    """Uniform in [0, 1): asks with probability 1 - price."""

    def forward(self, logits: Tensor) -> Tensor:
        """Random scores, whatever the logits."""
        return torch.rand(logits.shape[:-1], device=logits.device)


class EntropyGate(Gate):
    """Entropy of the next token, in nats."""

    def forward(self, logits: Tensor) -> Tensor:
        """The entropy of the visible tokens, in nats."""
        return entropy(logits, self.reserved)


class MarginGate(Gate):
    """Minus the logit gap between the best two tokens (= minus the gap of their log-probabilities)."""

    def forward(self, logits: Tensor) -> Tensor:
        """Minus the gap between the two highest logits."""
        return -margin(logits, self.reserved)


class MaxProbabilityGate(Gate):
    """Minus the probability of the best token."""

    def forward(self, logits: Tensor) -> Tensor:
        """Minus the probability of the best token."""
        return -best_probability(logits, self.reserved)


CONFIDENCE_GATES: dict[str, type[Gate]] = {
    "random": RandomGate,
    "entropy": EntropyGate,
    "margin": MarginGate,
    "max_probability": MaxProbabilityGate,
}
GATES: dict[str, type[Gate]] = {"learned": LearnedGate, **CONFIDENCE_GATES}
