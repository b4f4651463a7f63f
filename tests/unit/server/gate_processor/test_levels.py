"""Several teachers: the forced row tells how many of the dearer prices are exceeded."""

import math

import pytest
import torch
from torch import Tensor

from router.gate import MarginGate
from router.policy import Terms
from server.gate_processor import GateProcessor, GateProcessorV2, decide, force, gate_settings, terms_args
from server.vllm_api import MoveDirectionality, SamplingParams
from tests.helpers import v2_runner
from tests.helpers.gate_steps import CPU, ESCALATION, ROWS, engine_config, margins, update

INF = math.inf
NO = math.nan


def levels(logits: Tensor) -> list[int | None]:
    """For each row, the number of dearer prices that its score exceeds; None if it does not ask."""
    found: list[int | None] = []
    for row in logits:
        alone = (row > -INF).nonzero().flatten().tolist()
        found.append(alone[0] - ESCALATION if len(alone) == 1 else None)
    return found


def terms(price: float, *dearer: float) -> SamplingParams:
    return SamplingParams(extra_args=terms_args(Terms(price, dearer=dearer)))


def test_the_forced_row_counts_the_prices_below_the_score(reserved):
    logits = margins(2.0, 2.0, 2.0, 2.0, 2.0)  # scores of -2
    price = torch.tensor([-3.0, -3.0, -3.0, -1.0, INF])
    dearer = [[-1.0, 0.0, NO], [-2.5, -1.0, NO], [-2.5, -2.1, NO], [-2.5, -2.1, NO], [-INF, -INF, NO]]
    decide(MarginGate(reserved), logits, price, others=torch.tensor(dearer))
    assert levels(logits) == [0, 1, 2, None, None]


def test_rows_that_are_scored_have_their_own_prices(reserved):
    logits = margins(2.0, 2.0, 2.0)
    dearer = torch.tensor([[-INF, -INF, NO], [0.0, 0.0, NO], [-3.0, 0.0, NO]])
    decide(MarginGate(reserved), logits, torch.full((3,), -3.0), torch.tensor([1, 2]), others=dearer)
    assert levels(logits) == [None, 0, 1]


@pytest.mark.parametrize("rows", [None, [1, 3]])
def test_a_device_forces_the_same_rows_without_knowing_which_ones_ask(rows):
    logits = margins(1.0, 1.0, 1.0, 1.0)
    logits[:, ESCALATION:] = -INF
    chosen = None if rows is None else torch.tensor(rows)
    count = 4 if rows is None else 2
    ask = torch.tensor([True, False, False, True])[:count]
    force(logits, ESCALATION, ask, chosen, torch.tensor([2, 1, 0, 0])[:count])
    assert levels(logits) == ([2, None, None, 0] if rows is None else [None, 2, None, None])


def test_v1_prices_follow_their_request(reserved):
    config = engine_config(gate_settings(reserved, "margin", None, teachers=3))
    processor = GateProcessor(config, CPU, False)
    processor.update_state(update(added=[(0, terms(-3.0, -2.5, -1.0), []), (1, terms(-3.0), [])]))
    assert levels(processor.apply(margins(2.0, 2.0))) == [1, 0]
    processor.update_state(update(moved=[(0, 1, MoveDirectionality.SWAP)]))
    assert levels(processor.apply(margins(2.0, 2.0))) == [0, 1]
    processor.update_state(update(removed=[0], moved=[(1, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    assert levels(processor.apply(margins(2.0))) == [1]


def test_v2_prices_are_their_slots(reserved):
    states = v2_runner.request_states([3, 5, 7, 9], ROWS)
    settings = gate_settings(reserved, "margin", None, teachers=3)
    processor = GateProcessorV2(engine_config(settings), states)
    for slot, params in enumerate([terms(-3.0), terms(-3.0, -2.5, -2.1), SamplingParams()]):
        processor.add_request(slot, params)
    processor.apply_staged_writes()
    logits = processor.apply(margins(2.0, 2.0, 2.0), v2_runner.context([2, 1, 0], [20, 20, 20]))
    assert levels(logits) == [None, 2, 0]


def test_settings_for_one_teacher_are_unchanged(reserved):
    """The settings and terms for one teacher stay the same, byte for byte."""
    assert gate_settings(reserved, "margin", None, teachers=1) == gate_settings(reserved, "margin", None)
    assert terms_args(Terms(1.0)) == {"wheels_price": 1.0, "wheels_not_before": 0}
