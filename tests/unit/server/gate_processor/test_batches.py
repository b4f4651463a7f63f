"""Prices in the rows of V1's persistent batch."""

import math
import random
from types import SimpleNamespace

import pytest

from server.gate_processor import PRICE, GateProcessor
from server.vllm_api import MoveDirectionality, SamplingParams
from tests.helpers.gate_steps import BATCH, CountingGate, asks, margins, params, spare, update

SWAP, ONE_WAY = MoveDirectionality.SWAP, MoveDirectionality.UNIDIRECTIONAL


# V1: rows of a persistent batch


def step(processor: GateProcessor, batch: int, change: SimpleNamespace | None = None) -> list[bool]:
    """One decoding step at a margin of 2, in which a request asks if its price is below -2."""
    processor.update_state(change)
    return asks(processor.apply(margins(*[2.0] * batch)))


def test_an_empty_processor_masks_and_never_asks(processor):
    assert step(processor, 3) == [False] * 3


def test_the_logits_are_changed_in_place(processor):
    processor.update_state(update(added=[(0, params(-3.0), [])]))
    logits = margins(2.0)
    assert processor.apply(logits) is logits


def test_the_processor_changes_greedy_choices_too(processor):
    assert processor.is_argmax_invariant() is False


def test_requests_ask_at_their_own_price(processor):
    added = [(0, params(-3.0), []), (1, params(-1.0), []), (2, params(), []), (3, params(-9.0), [])]
    assert step(processor, 4, update(added=added)) == [True, False, False, True]
    assert step(processor, 4) == [True, False, False, True]  # and go on so without an update


def test_a_request_with_other_extra_args_never_asks(processor):
    added = [(0, SamplingParams(extra_args={"kv_transfer": 1}), [])]
    assert step(processor, 1, update(added=added)) == [False]


def test_a_price_alone_is_enough(processor):
    assert step(processor, 1, update(added=[(0, SamplingParams(extra_args={PRICE: -3.0}), [])])) == [True]


def test_prices_go_to_the_device_only_when_they_change(processor):
    step(processor, 1, update(added=[(0, params(-3.0), [])]))
    processor.device_prices.fill_(math.inf)  # what a needless copy would undo
    assert step(processor, 2) == [False, False]
    assert step(processor, 2, update(added=[(1, params(-3.0), [])])) == [True, True]


def test_a_removed_request_leaves_no_price_behind(processor):
    step(processor, 2, update(added=[(0, params(-3.0), []), (1, params(-3.0), [])]))
    assert step(processor, 2, update(removed=[1])) == [True, False]


def test_a_row_is_used_again(processor):
    step(processor, 1, update(added=[(0, params(-3.0), [])]))
    assert step(processor, 1, update(added=[(0, params(), [])])) == [False]
    assert step(processor, 1, update(added=[(0, params(-4.0), [])])) == [True]
    assert step(processor, 1, update(removed=[0], added=[(0, params(-1.0), [])])) == [False]


def test_a_moved_request_takes_its_price_along(processor):
    step(processor, 3, update(added=[(0, params(), []), (2, params(-3.0), [])]))
    assert step(processor, 3, update(removed=[1], moved=[(2, 0, ONE_WAY)])) == [True, False, False]


def test_swapped_requests_swap_prices(processor):
    step(processor, 3, update(added=[(0, params(-3.0), []), (2, params(-1.0), [])]))
    assert step(processor, 3, update(moved=[(0, 2, SWAP)])) == [False, False, True]
    assert step(processor, 3, update(moved=[(0, 2, SWAP)])) == [True, False, False]


def test_an_update_is_read_in_vllms_order(processor):
    """The order is removed, added, moved: a request that is added to row 1 moves on to row 0."""
    step(processor, 2, update(added=[(0, params(), []), (1, params(-3.0), [])]))
    change = update(removed=[1], added=[(1, params(-4.0), [])], moved=[(1, 0, ONE_WAY)])
    assert step(processor, 2, change) == [True, False]


def test_a_request_does_not_ask_before_its_time(processor):
    output: list[int] = []
    assert step(processor, 1, update(added=[(0, params(-3.0, not_before=2), output)])) == [False]
    output.append(5)
    assert step(processor, 1) == [False]
    output.append(5)
    assert step(processor, 1) == [True]
    output.append(5)
    assert step(processor, 1) == [True]


def test_a_request_that_comes_back_has_waited_already(processor):
    """After a preemption, vLLM adds a request again with the tokens that it had written."""
    assert step(processor, 1, update(added=[(0, params(-3.0, not_before=2), [5, 5])])) == [True]


def test_the_spare_price_comes_at_its_time(processor):
    """The margin gate's score is -2 here: above the price -3, below the price -1."""
    output: list[int] = []
    assert step(processor, 1, update(added=[(0, spare(-1.0, 1, -3.0, 3), output)])) == [False]
    for asked in (False, False, True, True):
        output.append(5)
        assert step(processor, 1) == [asked]


def test_a_spare_price_moves_with_its_request(processor):
    output: list[int] = []
    step(processor, 3, update(added=[(0, spare(-1.0, 0, -3.0, 2), output), (1, params(), [])]))
    assert step(processor, 3, update(moved=[(0, 2, ONE_WAY)])) == [False] * 3
    output += [5, 5]
    assert step(processor, 3) == [False, False, True]


@pytest.mark.parametrize(("direction", "row"), [(ONE_WAY, 2), (SWAP, 2)])
def test_a_waiting_request_can_be_moved(processor, direction, row):
    output: list[int] = []
    step(processor, 3, update(added=[(0, params(-3.0, not_before=1), output)]))
    assert step(processor, 3, update(moved=[(0, row, direction)])) == [False] * 3
    output.append(5)
    assert step(processor, 3) == [False, False, True]


def test_waiting_requests_can_be_swapped(processor):
    first, second = [], []
    added = [(0, params(-3.0, not_before=1), first), (1, params(-3.0, not_before=1), second)]
    step(processor, 2, update(added=added))
    step(processor, 2, update(moved=[(0, 1, SWAP)]))
    first.append(5)
    assert step(processor, 2) == [False, True]
    second.append(5)
    assert step(processor, 2) == [True, True]


def test_a_request_that_left_while_waiting_changes_no_other(processor):
    output: list[int] = []
    step(processor, 1, update(added=[(0, params(-3.0, not_before=1), output)]))
    step(processor, 1, update(removed=[0], added=[(0, params(), [])]))
    output.append(5)
    assert step(processor, 1) == [False]


def test_rows_beyond_the_batch_do_not_matter(processor):
    step(processor, 5, update(added=[(4, params(-3.0), []), (0, params(-3.0), [])]))
    assert step(processor, 2) == [True, False]


@pytest.mark.parametrize("seed", range(5))
def test_any_sequence_of_updates_keeps_prices_with_their_requests(processor, seed):
    """The reference is a plain list of requests that is changed as vLLM changes its batch."""
    draw = random.Random(seed)
    batch: list[tuple[float, int, list[int]]] = []  # (price, not_before, output ids) by row

    def request() -> tuple[float, int, list[int]]:
        return draw.choice([-3.0, -1.0, math.inf]), draw.choice([0, 0, 1, 3]), []

    for _ in range(300):
        removed = [row for row in range(len(batch)) if draw.random() < 0.15]
        added, moved, free = [], [], sorted(removed)
        while len(batch) - len(free) < BATCH and draw.random() < 0.4:
            row = free.pop(0) if free else len(batch)
            new = request()
            batch[row : row + 1] = [new]
            added.append((row, params(new[0], new[1]), new[2]))
        reused = {row for row, _, _ in added}
        still_removed = [row for row in removed if row not in reused]
        for hole in list(free):  # condense: the last request fills the lowest hole
            while batch and len(batch) - 1 in free:
                free.remove(len(batch) - 1)
                batch.pop()
            if hole not in free:
                continue
            moved.append((len(batch) - 1, hole, ONE_WAY))
            batch[hole] = batch.pop()
            free.remove(hole)
        if len(batch) > 1 and draw.random() < 0.3:
            first, second = draw.sample(range(len(batch)), 2)
            moved.append((first, second, SWAP))
            batch[first], batch[second] = batch[second], batch[first]

        changed = bool(removed or added or moved)
        expected = [price < -2 and len(output) >= wait for price, wait, output in batch]
        change = update(still_removed, added, moved) if changed else None
        assert step(processor, len(batch), change) == expected
        for _, _, output in batch:
            output.append(5)


def test_only_rows_that_may_ask_are_scored(processor, reserved):
    processor.gate = CountingGate(reserved)
    added = [(row, params(-3.0 if row == 4 else None), []) for row in range(5)]
    assert step(processor, 5, update(added=added)) == [False] * 4 + [True]
    assert processor.gate.seen == 1
    assert step(processor, 5) == [False] * 4 + [True]
    assert step(processor, 4) == [False] * 4, "without that row"
    assert processor.gate.seen == 2
    more = [(row, params(-3.0), []) for row in range(4)]
    assert step(processor, 5, update(added=more)) == [True] * 5
    assert processor.gate.seen == 2 + 5
