"""Keys and values of prompts that models have read, so that much can go on after each of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel


class LayerStates(NamedTuple):
    """What one layer keeps: (heads, T, D) of a prompt, or (B, heads, T, D) of a batch."""

    keys: Tensor
    values: Tensor


class ReadPrompts:
    """By model and prompt, without padding.

    Args:
        limit: bytes of all; what comes later is not kept.
    """

    def __init__(self, limit: float) -> None:
        self._left = limit
        self._kept: dict[tuple[int, tuple[int, ...]], list[LayerStates]] = {}

    def add(self, model: PreTrainedModel, prompts: Sequence[list[int]], cache: Cache) -> None:
        """Keep the rows of a cache in which these prompts end, as many as there is room for.

        Args:
            model: that read them.
            prompts: of each row.
            cache: padded on the left.
        """
        of_all: Sequence[Any] = cache.layers
        for row, prompt in enumerate(prompts):
            key = (id(model), tuple(prompt))
            if key in self._kept:
                continue
            ends = slice(-len(prompt), None)
            layers = [LayerStates(of.keys[row, :, ends], of.values[row, :, ends]) for of in of_all]
            size = sum(part.numel() * part.element_size() for layer in layers for part in layer)
            if size > self._left:
                return
            self._left -= size
            self._kept[key] = [LayerStates(*(part.clone() for part in layer)) for layer in layers]

    def has(self, model: PreTrainedModel, prompts: Sequence[list[int]]) -> bool:
        """Whether all of them are kept."""
        return all((id(model), tuple(prompt)) in self._kept for prompt in prompts)

    def batch(self, model: PreTrainedModel, prompts: Sequence[list[int]]) -> list[LayerStates]:
        """Of each layer for these prompts, which `has` has, padded on the left with zeros."""
        rows = [self._kept[id(model), tuple(prompt)] for prompt in prompts]
        longest = max(map(len, prompts))
        layers = []
        for states in zip(*rows, strict=True):
            layers.append(LayerStates(*(_padded(part, longest) for part in zip(*states, strict=True))))
        return layers


def _padded(rows: Sequence[Tensor], longest: int) -> Tensor:
    heads, _, width = rows[0].shape
    batch = torch.zeros(len(rows), heads, longest, width, dtype=rows[0].dtype, device=rows[0].device)
    for place, row in enumerate(rows):
        batch[place, :, longest - row.shape[1] :] = row
    return batch
