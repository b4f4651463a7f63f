"""Keeps the keys and values of prompts, so that a model reads each prompt once and continues it often."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel


class LayerStates(NamedTuple):
    """Keys and values of one layer: (heads, T, D) for a prompt, or (B, heads, T, D) for a batch."""

    keys: Tensor
    values: Tensor


class ReadPrompts:
    """Keys and values by model and prompt, without padding.

    Args:
        limit: most bytes to keep. Prompts that no longer fit are not kept.
    """

    def __init__(self, limit: float) -> None:
        self._left = limit
        self._kept: dict[tuple[int, tuple[int, ...]], list[LayerStates]] = {}

    def add(self, model: PreTrainedModel, prompts: Sequence[list[int]], cache: Cache) -> None:
        """Keep the keys and values of these prompts, until there is no more room.

        Args:
            model: the model that read the prompts.
            prompts: the prompt of each row of the cache, as token ids.
            cache: the model's cache after reading. Each row is padded on the left and ends with its prompt.
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
        """Whether all these prompts are kept for this model."""
        return all((id(model), tuple(prompt)) in self._kept for prompt in prompts)

    def batch(self, model: PreTrainedModel, prompts: Sequence[list[int]]) -> list[LayerStates]:
        """The states of each layer for these prompts, as a batch that is padded on the left with zeros.

        All prompts must be kept, see `has`.
        """
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
