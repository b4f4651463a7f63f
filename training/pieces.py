"""Computes values of many positions piece by piece, so that few logits exist at a time.

Logits over a real vocabulary are larger than the model that computes them: 4,096 positions of 151,936 ids
take 2.5 GB, and a loss needs several tensors of that size. With pieces, the logits of one piece exist at a
time. They are computed in the forward pass, forgotten, and computed again in the backward pass (Chen et al.
2016, arXiv 1604.06174).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

PIECE = 2**24
"""Number of logits in a piece: 64 MiB in float32. A loss needs about eight tensors of that size."""


def in_pieces(values: Callable[[slice], Tensor], positions: int, width: int, piece: int) -> Tensor:
    """The values (N, …) of all positions, computed piece by piece.

    Args:
        values: computes the values (n, …) of a slice of the positions. The backward pass calls it again.
        positions: N, the number of positions.
        width: number of logits of one position.
        piece: number of logits that may exist at a time. If all of them fit, nothing is computed twice.
    """
    size = max(1, piece // width)
    if positions <= size:
        return values(slice(0, positions))
    found = []
    for first in range(0, positions, size):
        part = slice(first, min(first + size, positions))
        found.append(checkpoint(values, part, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(found)


def pieces_of(states: Tensor, width: int) -> tuple[Tensor, ...]:
    """The states (N, H), split into pieces of at most `PIECE` logits, with `width` logits for each state."""
    return states.split(max(1, PIECE // width))
