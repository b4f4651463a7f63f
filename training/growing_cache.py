"""A key-value cache that grows by doubling: `DynamicLayer` copies everything at every step (70 % of our
rollouts).
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

FIRST_CAPACITY = 64


class GrowingLayer(DynamicLayer):
    """`keys` and `values` (B, heads, T, D) are views of buffers with room for more."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [key_states.new_empty(0), value_states.new_empty(0)]
        past = self.get_seq_length()
        end = past + key_states.shape[-2]
        views = []
        for i, (old, new) in enumerate(((self.keys, key_states), (self.values, value_states))):
            buffer = self._buffers[i]
            if buffer.numel() == 0 or buffer.shape[0] != new.shape[0] or buffer.shape[-2] < end:
                batch, heads, _, width = new.shape
                buffer = new.new_empty(batch, heads, max(FIRST_CAPACITY, 2 * past, end), width)
                if past:
                    buffer[:, :, :past] = old
                self._buffers[i] = buffer
            buffer[:, :, past:end] = new
            views.append(buffer[:, :, :end])
        self.keys, self.values = views
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        past = self.get_seq_length()
        self._buffers = [torch.index_select(buffer, 0, indices) for buffer in self._buffers]
        self.keys, self.values = (buffer[:, :, :past] for buffer in self._buffers)


def growing_cache() -> Cache:
    """For models whose layers all attend to everything."""
    return Cache(layer_class_to_replicate=GrowingLayer)
