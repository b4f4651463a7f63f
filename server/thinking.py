"""The thinking budget (`thinking_token_budget`), over the whole completion.

vLLM writes the end of the thinking itself when the budget is used up. It also finds the beginning in a
prompt, so the student's engine counts correctly after a span. The teacher's server is not involved: a span
ends where the budget ends, and the student continues.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from server.vllm_api import ReasoningMarkers


@dataclass(frozen=True)
class Thinking:
    """The rest of a thinking budget after some tokens."""

    markers: ReasoningMarkers
    budget: int
    left: int | None = None
    """Tokens that the thinking may still have; None outside of thinking."""
    tail: tuple[int, ...] = ()
    """The last tokens, as many as the longer marker has."""

    def after(self, token_ids: Iterable[int]) -> "Thinking":
        """The rest after these further tokens."""
        markers = self.markers
        left = self.left
        tail = self.tail
        for token_id in token_ids:
            tail = (*tail, token_id)[-markers.longest :]
            if _ends_with(tail, markers.end):
                left = None
            elif _ends_with(tail, markers.start):
                left = self.budget
            elif left is not None:
                left = max(0, left - 1)
        return replace(self, left=left, tail=tail)

    def room(self, token_ids: Sequence[int]) -> int:
        """Number of these tokens that may come before the thinking has to end."""
        thinking = self
        for place, token_id in enumerate(token_ids):
            if thinking.ends:
                return place
            thinking = thinking.after([token_id])
        return len(token_ids)

    @property
    def ends(self) -> bool:
        """Whether the thinking has to end here: vLLM writes its end in the student's segment."""
        return self.left == 0

    @property
    def segment(self) -> int | None:
        """Most tokens of the student's next segment, if it has to write or continue a marker; else None.

        vLLM does not see a marker that begins in a prompt and ends in the output.
        """
        if self.ends:
            return len(self.markers.forced)
        for marker in (self.markers.start, self.markers.end):
            for length in range(1, len(marker)):
                if _ends_with(self.tail, marker[:length]):
                    return 1
        return None


def _ends_with(tail: Sequence[int], marker: Sequence[int]) -> bool:
    return tuple(tail[-len(marker) :]) == tuple(marker)
