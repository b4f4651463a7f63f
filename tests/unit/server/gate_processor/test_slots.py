"""Prices in V2's slots, which are mapped to rows at every step."""

import math

import pytest
import torch
from torch.nn import functional

from router.gate import MarginGate
from server import gate_processor
from server.gate_processor import PRICE, decide
from server.vllm_api import SamplingParams
from tests.helpers.gate_steps import V2, CountingGate, margins, params, spare

# V2: slots, mapped to rows at every step


def test_v2_maps_rows_to_slots(reserved):
    v2 = V2(reserved)
    for slot, price in enumerate([-3.0, -1.0, None, -9.0]):
        v2.add(slot, params(price))
    assert v2.step([3, 1, 0, 2], [20, 20, 20, 20]) == [True, False, True, False]
    assert v2.step([0], [20]) == [True]


def test_v2_counts_the_tokens_written_by_position(reserved):
    v2 = V2(reserved)
    v2.add(1, params(-3.0, not_before=2))  # 5 prompt tokens: positions 0 to 4
    asked = [v2.step([1], [pos]) for pos in (4, 5, 6, 7)]  # 0, 1, 2, 3 tokens written
    assert asked == [[False], [False], [True], [True]]


def test_v2_a_slot_is_used_again(reserved):
    v2 = V2(reserved)
    v2.add(0, params(-3.0, not_before=1))
    assert v2.step([0], [9]) == [True]
    v2.add(0, params())
    assert v2.step([0], [9]) == [False]
    v2.add(0, params(-3.0))
    assert v2.step([0], [2]) == [True]


def test_v2_a_price_alone_is_enough(reserved):
    v2 = V2(reserved)
    v2.add(0, params(-3.0, not_before=5))
    v2.add(0, SamplingParams(extra_args={PRICE: -3.0}))
    assert v2.step([0], [2]) == [True]


def test_v2_terms_go_to_the_device_only_when_they_change(reserved):
    v2 = V2(reserved)
    v2.add(0, params(-3.0))
    assert v2.step([0], [9]) == [True]
    v2.processor.device_terms.fill_(math.inf)  # what a needless copy would undo
    assert v2.step([0], [9]) == [False]
    v2.add(1, params(-3.0))
    assert v2.step([0, 1], [9, 9]) == [True, True]


def test_v2_draft_tokens_are_rows_of_their_request(reserved):
    v2 = V2(reserved)
    v2.add(0, params(-3.0, not_before=2))
    v2.add(1, params(-1.0))
    assert v2.step([0, 0, 0, 1], [3, 4, 5, 9]) == [False, True, True, False]


# What it costs


def test_v2_requests_that_may_not_ask_are_not_scored(reserved):
    v2 = V2(reserved)
    for slot in range(4):
        v2.add(slot, params())
    assert v2.step([0, 1, 2, 3], [20] * 4) == [False] * 4
    assert v2.processor.gate.seen == 0


def test_v2_only_rows_that_may_ask_are_scored(reserved):
    v2 = V2(reserved)
    for slot, price in enumerate([None, -3.0, None, None]):
        v2.add(slot, params(price))
    assert v2.step([2, 1, 0, 3], [20] * 4) == [False, True, False, False]
    assert v2.processor.gate.seen == 1
    assert v2.step([2, 0], [21, 21]) == [False, False], "the one that may ask is not in this step"
    assert v2.processor.gate.seen == 1


def test_v2_requests_are_not_scored_before_they_may_ask(reserved):
    v2 = V2(reserved)
    v2.add(1, params(-3.0, not_before=3))  # 5 prompt tokens
    assert [v2.step([1], [pos]) for pos in (4, 5, 6)] == [[False]] * 3
    assert v2.processor.gate.seen == 0
    assert v2.step([1], [7]) == [True]
    assert v2.processor.gate.seen == 1


def test_v2_a_request_that_left_its_slot_is_not_scored(reserved):
    v2 = V2(reserved)
    v2.add(0, params(-3.0))
    v2.add(0, params())
    v2.step([0], [9])
    assert v2.processor.gate.seen == 0


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("rows", [None, [0, 2, 3]])
def test_pieces_change_no_decision(reserved, monkeypatch, rows, padding):
    """The rows may be apart in memory, as the rows of a padded vocabulary are."""
    price = torch.tensor([-3.0, -3.0, -1.0, -3.0])
    chosen = None if rows is None else torch.tensor(rows)
    whole = margins(2.0, 2.0, 2.0, 2.0)
    pieces = functional.pad(whole, (0, padding))[:, : whole.shape[1]]
    decide(MarginGate(reserved), whole, price, chosen)
    monkeypatch.setattr(gate_processor, "PIECE_ON_CPU", 1)
    gate = CountingGate(reserved)
    decide(gate, pieces, price, chosen)
    assert torch.equal(whole, pieces)
    assert gate.seen == (4 if rows is None else 3)


def test_v2_knows_the_spare_price(reserved):
    v2 = V2(reserved)
    v2.add(1, spare(-1.0, 1, -3.0, 3))  # 5 prompt tokens
    assert [v2.step([1], [pos]) for pos in (4, 5, 6, 7, 8)] == [[False]] * 3 + [[True]] * 2
