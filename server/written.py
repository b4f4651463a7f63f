"""What a completion had before a segment, which vLLM counts as the segment's own.

A segment's prompt ends with the tokens that are written already. For vLLM they would be the prompt's:
`presence_penalty`, `frequency_penalty` and `bad_words` look at what a request wrote itself.
"""

import torch
from torch import Tensor

from server.vllm_api import SamplingParams

WRITTEN = "wheels_written"
"""In the ``extra_args`` of a segment: this many tokens at the end of its prompt are the completion's."""
GRAMMAR_FROM = "wheels_grammar_from"
"""Likewise: the place in the segment's prompt from which a grammar has to take tokens."""


def written_args(params: SamplingParams, written: int) -> dict[str, int]:
    """The ``extra_args`` of a segment after ``written`` tokens, if any of its parameters counts them."""
    counts = bool(params.presence_penalty or params.frequency_penalty or params.bad_words)
    return {WRITTEN: written} if counts and written else {}


def _written(params: SamplingParams) -> int:
    return int((params.extra_args or {}).get(WRITTEN, 0))


class WrittenInRows:
    """V1: by row of the persistent batch."""

    def __init__(self) -> None:
        self._ids: dict[int, list[int]] = {}

    def set(self, row: int, params: SamplingParams, prompt_ids: list[int] | None) -> None:
        """A request takes a row."""
        self.drop(row)
        count = _written(params)
        if count and prompt_ids:
            self._ids[row] = prompt_ids[-count:]

    def drop(self, row: int) -> None:
        """A request leaves its row."""
        self._ids.pop(row, None)

    def move(self, first: int, second: int, *, swap: bool) -> None:
        """The request of row ``first`` goes to ``second``, and back if they swap."""
        here = self._ids.pop(first, None)
        there = self._ids.pop(second, None)
        if here is not None:
            self._ids[second] = here
        if swap and there is not None:
            self._ids[first] = there

    def outputs(self, output_ids: list[list[int]]) -> list[list[int]]:
        """The output ids of every row, with those that came before."""
        if not self._ids:
            return output_ids
        whole = list(output_ids)
        for row, ids in self._ids.items():
            if row < len(whole):
                whole[row] = ids + whole[row]
        return whole


class WrittenInSlots:
    """V2: by request slot; ids are on the device anyway, so the border is all there is to move."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._counts = torch.zeros(slots, dtype=torch.int32)
        self._on_device = self._counts.to(device)
        self._changed = False

    def set(self, slot: int, params: SamplingParams) -> None:
        """A request takes a slot."""
        self._counts[slot] = _written(params)
        self._changed = True

    def prompt_lengths(self, lengths: Tensor) -> Tensor:
        """The prompt's length in every slot, without what is written. (slots,) int32."""
        if self._changed:
            self._on_device.copy_(self._counts)
            self._changed = False
        return lengths - self._on_device
