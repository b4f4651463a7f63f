"""A budget for thinking: the rest of it, and vLLM's own count, which agrees across borders."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

from server.thinking import Thinking
from server.vllm_api import ReasoningMarkers

ONE = ReasoningMarkers(start=(1,), end=(2,), forced=(2,))
TWO = ReasoningMarkers(start=(1, 1), end=(2, 3), forced=(4, 2, 3))
FREE = 5
"""The token that the model would write without a budget."""


def thinking(ids: list[int], budget: int = 3, markers: ReasoningMarkers = ONE) -> Thinking:
    return Thinking(markers, budget).after(ids)


@pytest.mark.parametrize(
    ("ids", "left"),
    [
        ([], None),
        ([5, 6], None),
        ([5, 1], 3),
        ([1, 5, 6], 1),
        ([1, 5, 6, 7], 0),
        ([1, 5, 6, 7, 8, 9], 0),
        ([1, 5, 2], None),
        ([1, 5, 2, 5, 1, 6], 2),
        ([2, 1], 3),
    ],
)
def test_tokens_are_counted_from_the_last_beginning(ids, left):
    assert thinking(ids).left == left
    assert thinking(ids[:1]).after(ids[1:]) == thinking(ids)


def test_markers_of_several_tokens_count_when_they_are_whole():
    assert thinking([1], markers=TWO).left is None
    assert thinking([1, 1, 2], markers=TWO).left == 2
    assert thinking([1, 1, 2, 3], markers=TWO).left is None


@pytest.mark.parametrize(
    ("before", "piece", "room"),
    [
        ([5], [5, 5, 5, 5, 5], 5),
        ([1], [5, 5, 5, 5], 3),
        ([1, 5, 5, 5], [5], 0),
        ([5], [5, 1, 5, 5, 5, 5], 5),
        ([1], [5, 2, 5, 5, 5, 5], 6),
        ([1, 5, 5], [2, 5, 5], 3),
        ([1], [], 0),
    ],
)
def test_a_span_has_room_until_the_thinking_has_to_end(before, piece, room):
    assert thinking(before).room(piece) == room


def test_the_student_writes_the_end_and_what_is_left_of_a_marker_alone():
    assert thinking([1, 5]).segment is None
    assert thinking([1, 5, 5, 5]).segment == 1
    assert thinking([1, 1, 5, 5, 5], markers=TWO).segment == 3
    assert thinking([5, 1], markers=TWO).segment == 1
    assert thinking([1, 1, 5, 2], markers=TWO).segment == 1
    assert thinking([5, 4], markers=TWO).segment is None


# vLLM's V1 runner, which keeps its count in steps


class Runner:
    """Writes with vLLM's thinking budget, in segments that begin at places set by the test."""

    def __init__(self, markers: ReasoningMarkers) -> None:
        config = SimpleNamespace(
            reasoning_start_token_ids=list(markers.start), reasoning_end_token_ids=list(markers.forced)
        )
        self.holder = ThinkingBudgetStateHolder(config, 1, 0, torch.device("cpu"), False)

    def segment(self, prompt: list[int], budget: int, wanted: list[int]) -> list[int]:
        """The tokens that vLLM writes if the model wants to write ``wanted``."""
        written: list[int] = []
        params = SimpleNamespace(thinking_token_budget=budget)
        batch = SimpleNamespace(removed=[], added=[(0, params, prompt, written)], moved=[])
        self.holder.sync_batch(batch)
        for token_id in wanted:
            self.holder.update_state([written], None)
            logits = torch.zeros(1, 10)
            logits[0, token_id] = 9.0
            written.append(int(self.holder.apply_to_logits(logits, False, None).argmax()))
        return written


@pytest.mark.parametrize("markers", [ONE, ReasoningMarkers((1,), (2, 3), (2, 3))], ids=["one", "two"])
@pytest.mark.parametrize("budget", [0, 1, 4, 20])
@pytest.mark.parametrize(
    "text", [[1, 5, 6, 7, 8, 5, 6, 7], [5, 6, 1, 5, 6, 7, 8, 5], [1, 5, 2, 3, 6, 1, 7, 8]], ids=str
)
@pytest.mark.parametrize("prompt", [[6], [6, 1, 7, 7]], ids=["before", "thinking"])
def test_the_students_engine_goes_on_after_a_border_as_without_one(markers, budget, text, prompt):
    text = [token for token in text if token != 1 or 1 not in prompt]
    whole = Runner(markers).segment(prompt, budget, text)
    state = Thinking(markers, budget).after(prompt)
    for border in range(1, len(whole)):
        state = state.after([whole[border - 1]])
        inside = whole[:border][-1:] == [2] and len(markers.end) > 1
        if inside:
            continue  # the student writes the rest of a marker in a segment of its own
        rest = Runner(markers).segment(prompt + whole[:border], budget, text[border:])
        assert whole[:border] + rest == whole, border
        assert whole[border] == 2 or not state.ends, border
        assert state.ends or text[border] == whole[border], border
