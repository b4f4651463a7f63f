"""Values of many positions, a piece of the positions at a time.

Logits over a real vocabulary are larger than the model that gives them: 4,096 positions of 151,936 ids take
2.5 GB, and a loss needs several tensors of that size. In pieces, one piece's logits exist at a time. They are
computed in the forward pass, forgotten, and computed again in the backward pass (Chen et al. 2016, arXiv
1604.06174).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

PIECE = 2**24
"""Logits of a piece: 64 MiB in float32. A loss needs some eight tensors of that size."""


def in_pieces(values: Callable[[slice], Tensor], positions: int, width: int, piece: int) -> Tensor:
    """What `values` gives for all positions, (N, …).

    Args:
        values: a slice of the positions -> their values (n, …). It is called again in the backward pass.
        positions: N.
        width: logits of a position.
        piece: logits that may exist at a time. If all of them may, nothing is computed twice.
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
    """States (N, H), as many at a time as have `PIECE` logits of this width together."""
    return states.split(max(1, PIECE // width))
