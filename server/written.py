"""Earlier tokens of a completion, which vLLM has to count as a segment's own output.

A segment's prompt ends with the completion so far. To vLLM these tokens would be a part of the prompt, but
`presence_penalty`, `frequency_penalty` and `bad_words` look only at a request's own output.
"""

import torch
from torch import Tensor

from server.vllm_api import SamplingParams

WRITTEN = "wheels_written"
"""Key in a segment's ``extra_args``: number of tokens at the end of its prompt that are the completion's."""
GRAMMAR_FROM = "wheels_grammar_from"
"""Key in a segment's ``extra_args``: index in its prompt from which a grammar has to take the tokens."""


def written_args(params: SamplingParams, written: int) -> dict[str, int]:
    """The ``extra_args`` of a segment after ``written`` tokens, if any of its parameters counts them."""
    counts = bool(params.presence_penalty or params.frequency_penalty or params.bad_words)
    return {WRITTEN: written} if counts and written else {}


def _written(params: SamplingParams) -> int:
    return int((params.extra_args or {}).get(WRITTEN, 0))


class WrittenInRows:
    """Earlier tokens of each request in the V1 runner, by row of the persistent batch."""

    def __init__(self) -> None:
        self._ids: dict[int, list[int]] = {}

    def set(self, row: int, params: SamplingParams, prompt_ids: list[int] | None) -> None:
        """Note the earlier tokens of a request that takes a row."""
        self.drop(row)
        count = _written(params)
        if count and prompt_ids:
            self._ids[row] = prompt_ids[-count:]

    def drop(self, row: int) -> None:
        """Forget the request that leaves a row."""
        self._ids.pop(row, None)

    def move(self, first: int, second: int, *, swap: bool) -> None:
        """Move the request of row ``first`` to ``second``, and the other way round too if they swap."""
        here = self._ids.pop(first, None)
        there = self._ids.pop(second, None)
        if here is not None:
            self._ids[second] = here
        if swap and there is not None:
            self._ids[first] = there

    def outputs(self, output_ids: list[list[int]]) -> list[list[int]]:
        """The output ids of every row, after the earlier ids of its completion."""
        if not self._ids:
            return output_ids
        whole = list(output_ids)
        for row, ids in self._ids.items():
            if row < len(whole):
                whole[row] = ids + whole[row]
        return whole


class WrittenInSlots:
    """Number of earlier tokens in the V2 runner, by request slot; their ids are on the device already."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._counts = torch.zeros(slots, dtype=torch.int32)
        self._on_device = self._counts.to(device)
        self._changed = False

    def set(self, slot: int, params: SamplingParams) -> None:
        """Note the number of earlier tokens of a request that takes a slot."""
        self._counts[slot] = _written(params)
        self._changed = True

    def prompt_lengths(self, lengths: Tensor) -> Tensor:
        """Length of every slot's prompt without the earlier tokens of its completion, (slots,) int32."""
        if self._changed:
            self._on_device.copy_(self._counts)
            self._changed = False
        return lengths - self._on_device
