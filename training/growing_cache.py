"""A key-value cache that grows by doubling.

`DynamicLayer` of transformers copies all keys and values at every step, which took 70 % of the time of our
rollouts.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

FIRST_CAPACITY = 64


class GrowingLayer(DynamicLayer):
    """The cache of one layer: `keys` and `values` (B, heads, T, D) are views of buffers with spare room."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the states of new tokens, and return the keys and values of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._key_buffer = key_states.new_empty(0)
            self._value_buffer = value_states.new_empty(0)
        past = self.get_seq_length()
        end = past + key_states.shape[-2]
        self._key_buffer = _appended(self._key_buffer, key_states, past)
        self._value_buffer = _appended(self._value_buffer, value_states, past)
        self.keys = self._key_buffer[:, :, :end]
        self.values = self._value_buffer[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows of the batch."""
        past = self.get_seq_length()
        self._key_buffer = torch.index_select(self._key_buffer, 0, indices)
        self._value_buffer = torch.index_select(self._value_buffer, 0, indices)
        self.keys = self._key_buffer[:, :, :past]
        self.values = self._value_buffer[:, :, :past]


def _appended(buffer: Tensor, new: Tensor, past: int) -> Tensor:
    """The buffer with the new states after its `past` old ones; a larger buffer if they do not fit."""
    batch, heads, count, width = new.shape
    end = past + count
    if buffer.numel() == 0 or buffer.shape[0] != batch or buffer.shape[-2] < end:
        larger = new.new_empty(batch, heads, max(FIRST_CAPACITY, 2 * past, end), width)
        if past:
            larger[:, :, :past] = buffer[:, :, :past]
        buffer = larger
    buffer[:, :, past:end] = new
    return buffer


def growing_cache() -> Cache:
    """An empty cache, for models whose layers all attend to every earlier token."""
    return Cache(layer_class_to_replicate=GrowingLayer)
