"""The decision to ask, and how the engine builds the gate that makes it."""

import math

import pytest
import torch

from router.checkpoint import RouterCheckpoint
from router.gate import MarginGate
from router.policy import NEVER, Terms
from server.gate_processor import GateProcessor, decide, gate_settings, mask_reserved, terms_args
from tests.helpers.gate_steps import CPU, ROWS, CountingGate, asks, engine_config, margins, params, update

# The decision


def test_the_escalation_token_is_forced_if_and_only_if_the_score_exceeds_the_price(reserved):
    logits = margins(2.0, 2.0, 2.0, 2.0, 0.0)
    untouched = logits.clone()
    price = torch.tensor([-3.0, -2.0, -1.0, math.inf, -math.inf])
    decide(MarginGate(reserved), logits, price)
    assert asks(logits) == [True, False, False, False, True]
    assert torch.equal(logits[1:4, :10], untouched[1:4, :10])


def test_the_gate_reads_the_reserved_rows_before_they_are_masked(router):
    logits = margins(0.0, 0.0)
    logits[:, 11] = torch.tensor([1.5, 0.5])  # the fixture's gate scores by its first tap
    decide(router.build_gate(), logits, torch.tensor([1.0, 1.0]))
    assert asks(logits) == [True, False]


def test_a_score_that_is_no_number_does_not_ask(reserved):
    logits = torch.full((1, ROWS), -math.inf)
    decide(MarginGate(reserved), logits, torch.tensor([-math.inf]))
    assert (logits == -math.inf).all()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_masking_covers_the_reserved_rows_and_no_other(reserved, shape):
    logits = torch.zeros(*shape, ROWS)
    mask_reserved(logits, reserved)
    assert (logits[..., 10:] == -math.inf).all()
    assert (logits[..., :10] == 0).all()


def test_terms_travel_in_extra_args():
    assert terms_args(Terms(1.5, 7)) == {"wheels_price": 1.5, "wheels_not_before": 7}
    assert terms_args(NEVER) == {"wheels_price": math.inf, "wheels_not_before": 0}


# Building the gate


def test_a_gate_is_run_once_before_the_first_request(processor, reserved):
    """The first run compiles the gate's loops."""
    gate = CountingGate(reserved)
    processor.take(gate)
    assert processor.gate is gate
    assert gate.seen == 1


def test_the_engine_builds_the_learned_gate_from_the_router(router, reserved, tmp_path):
    router.save(tmp_path)
    processor = GateProcessor(engine_config(gate_settings(reserved, "learned", tmp_path)), CPU, False)
    processor.update_state(update(added=[(0, params(1.0), []), (1, params(2.0), [])]))
    logits = margins(9.0, 9.0)
    logits[:, 11] = 1.5
    assert asks(processor.apply(logits)) == [True, False]


def test_another_router_makes_other_decisions(router, reserved, tmp_path):
    opposite = {**router.gate, "mlp.4.weight": -router.gate["mlp.4.weight"]}
    decisions = []
    for name, gate in (("trained", router.gate), ("opposite", opposite)):
        RouterCheckpoint(router.config, router.taps, gate).save(tmp_path / name)
        settings = gate_settings(reserved, "learned", tmp_path / name)
        processor = GateProcessor(engine_config(settings), CPU, False)
        processor.update_state(update(added=[(row, params(1.0), []) for row in range(3)]))
        logits = margins(0.0, 0.0, 0.0)
        logits[:, 11] = torch.tensor([2.0, -2.0, 0.0])
        decisions.append(asks(processor.apply(logits)))
    assert decisions == [[True, False, False], [False, True, False]]


def test_the_settings_are_plain_json(reserved, tmp_path):
    assert gate_settings(reserved, "margin", None) == {
        "wheels": {"reserved": [10, 4], "gate": "margin", "router": None}
    }
    assert gate_settings(reserved, "learned", tmp_path)["wheels"]["router"] == str(tmp_path)
