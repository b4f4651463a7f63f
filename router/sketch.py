"""A sketch of a gate's scores: the latest scores, and their quantiles."""

import math

import torch
from torch import Tensor

from router.adaptive import SeenScores

POSITIONS = 8192
"""Number of scores that are kept: the latest ones, so the distribution follows the traffic."""
QUANTILES = 257


class ScoreSketch:
    """Keeps the scores of the latest positions, on the device where they are computed."""

    def __init__(self, device: torch.device, positions: int = POSITIONS) -> None:
        self._ring = torch.full((positions,), math.nan, device=device)
        self._next = 0

    def add(self, scores: Tensor) -> None:
        """Add the scores of one step.

        Args:
            scores: (B,) float32; nan for a position at which the student could not have asked.
        """
        scores = scores[-len(self._ring) :]
        head = scores[: len(self._ring) - self._next]
        rest = scores[len(head) :]
        self._ring[self._next : self._next + len(head)] = head
        self._ring[: len(rest)] = rest
        self._next = (self._next + len(scores)) % len(self._ring)

    def read(self) -> SeenScores:
        """Quantiles of the finite scores that are kept."""
        scores = self._ring.cpu()
        scores = scores[scores.isfinite()].sort().values
        if not len(scores):
            return SeenScores((), 0)
        places = torch.linspace(0, len(scores) - 1, QUANTILES).long()
        return SeenScores(scores[places].tolist(), len(scores))
