"""The costs of gates over real vocabularies."""

from dataclasses import replace

import pytest
import torch

from measuring.pair import Pair
from router.gate import GATES, LearnedGate
from router.gate_names import UNTRAINED_GATE
from router.reserved import ReservedRows
from server.bench import gate
from tests.helpers.paths import DEMO


def test_every_gate_is_a_multiple_of_one_log_softmax() -> None:
    row = gate._row(32, 49_184, {"log_softmax": 0.002, "amax": 0.0002, "learned": 0.004})
    assert row["log_softmax, ms"] == 2.0
    assert (row["rows"], row["vocabulary"]) == (32, 49_184)
    assert row["amax"] == pytest.approx(0.1)
    assert row["learned"] == 2.0


def test_a_pairs_own_gate_is_timed() -> None:
    assert gate._gate(Pair.in_directory(DEMO)).reserved == ReservedRows(480)
    assert isinstance(gate._gate(Pair.in_directory(DEMO)), LearnedGate)
    assert gate.seconds(Pair.in_directory(DEMO), 4, turns=5) > 0


def test_a_pair_without_a_router_has_the_gate_that_the_gateway_takes() -> None:
    """The reserved rows come after the student's 512 rows."""
    untrained = gate._gate(replace(Pair.in_directory(DEMO), router=None))
    assert isinstance(untrained, GATES[UNTRAINED_GATE])
    assert untrained.reserved.start == 512


def test_all_gates_are_timed_on_one_thread() -> None:
    before = torch.get_num_threads()
    with gate._one_thread(), torch.inference_mode():
        assert torch.get_num_threads() == 1
        times = gate._times(2, 2048, gate.Effort(turns=3, seconds=0.0))
    assert set(times) == {"log_softmax", "anew", "amax", *GATES}
    assert {len(found) for found in times.values()} == {3}
    assert torch.get_num_threads() == before


def test_quick_work_is_repeated_more_often() -> None:
    """Nine pieces of work of some microseconds each run many times in a twentieth of a second."""
    with gate._one_thread(), torch.inference_mode():
        times = gate._times(1, 64, gate.Effort(turns=3, seconds=0.05))
    assert sum(map(sum, times.values())) >= 0.05
    assert len(times["log_softmax"]) > 3
