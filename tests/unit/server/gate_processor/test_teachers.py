"""A gate with an output for each of several teachers: the forced row tells which teacher it asks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from router.policy import LeastPrice, Terms
from server.gate_processor import (
    GateProcessor,
    GateProcessorV2,
    ask_by_worth,
    decide,
    gate_settings,
    terms_args,
)
from server.vllm_api import MoveDirectionality, SamplingParams
from tests.helpers import v2_runner
from tests.helpers.gate_steps import CPU, ESCALATION, ROWS, engine_config, update

INF = math.inf
FREE = (-INF, -INF)


def worth(*rows: tuple[float, float]) -> Tensor:
    """(B, V) logits with these worths of small and big in each row; big costs twice as much as small."""
    logits = torch.zeros(len(rows), ROWS)
    logits[:, 11:13] = torch.tensor(rows)
    return logits


def asked(logits: Tensor) -> list[str | None]:
    """For each row, the teacher that it asks; None if it asks none."""
    found: list[str | None] = []
    for row in logits:
        alone = (row > -INF).nonzero().flatten().tolist()
        found.append(("small", "big")[alone[0] - ESCALATION] if len(alone) == 1 else None)
    return found


def terms(price: float, *least: float) -> SamplingParams:
    named = tuple(map(LeastPrice, ("small", "big"), least))
    return SamplingParams(extra_args=terms_args(Terms(price, least=named)))


def test_the_teacher_that_is_worth_most_above_its_price_is_asked(router_of_two):
    """At a common price of 2, the price of small is 1 and the price of big is 2."""
    logits = worth((1.5, 2.4), (1.5, 2.6), (0.9, 1.9), (1.1, -1.0), (9.0, 9.0))
    price = torch.tensor([2.0, 2.0, 2.0, 2.0, INF])
    scored = decide(router_of_two.build_gate(), logits, price)
    assert asked(logits) == ["small", "big", None, "small", None]
    assert scored.tolist() == pytest.approx([3.0, 3.0, 1.9, 2.2, 18.0])


def test_least_prices_keep_a_teacher_back(router_of_two):
    logits = worth(*[(1.5, 2.4)] * 4)
    least = torch.tensor([FREE, (INF, -INF), (1.45, -INF), (1.45, 2.39)])
    decide(router_of_two.build_gate(), logits, torch.full((4,), 2.0), others=least)
    assert asked(logits) == ["small", "big", "big", "small"]


def test_rows_that_are_scored_have_their_own_terms(router_of_two):
    logits = worth((9.0, 0.0), (1.5, 2.6), (1.5, 2.6))
    least = torch.tensor([FREE, (-INF, INF), FREE])
    decide(router_of_two.build_gate(), logits, torch.full((3,), 2.0), torch.tensor([1, 2]), others=least)
    assert asked(logits) == [None, "small", "big"]


def test_at_a_price_of_minus_infinity_the_best_teacher_is_asked(router_of_two):
    logits = worth((-3.0, -1.0), (-1.0, -3.0), (-3.0, -1.0))
    least = torch.tensor([FREE, FREE, (-INF, INF)])
    decide(router_of_two.build_gate(), logits, torch.full((3,), -INF), others=least)
    assert asked(logits) == ["big", "small", "small"]


def test_without_least_prices_the_first_row_stands_for_all(router_of_two):
    """With `min_tokens`, vLLM would mask all rows but the first."""
    gate = router_of_two.build_gate()
    found = ask_by_worth(gate, torch.tensor([[0.0, 5.0]]), torch.tensor([2.0]), torch.full((1, 2), math.nan))
    assert (found.ask.tolist(), found.levels.tolist()) == ([True], [0])


def v1(router: Any, reserved: Any, directory: Any) -> GateProcessor:
    router.save(directory)
    settings = gate_settings(reserved, "learned", directory, teachers=2)
    return GateProcessor(engine_config(settings), CPU, False)


def test_v1_terms_follow_their_request(router_of_two, reserved, tmp_path):
    processor = v1(router_of_two, reserved, tmp_path)
    both, small = terms(2.0, *FREE), terms(2.0, -INF, INF)
    processor.update_state(update(added=[(0, both, []), (1, small, [])]))
    step = [(1.5, 2.6), (1.5, 2.6)]
    assert asked(processor.apply(worth(*step))) == ["big", "small"]
    processor.update_state(update(moved=[(0, 1, MoveDirectionality.SWAP)]))
    assert asked(processor.apply(worth(*step))) == ["small", "big"]
    processor.update_state(update(removed=[0], moved=[(1, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    assert asked(processor.apply(worth(step[0]))) == ["big"]
    processor.update_state(update(added=[(1, SamplingParams(), [])]))
    assert asked(processor.apply(worth(*step))) == ["big", None]


def test_v2_terms_are_their_slots(router_of_two, reserved, tmp_path):
    router_of_two.save(tmp_path)
    states = v2_runner.request_states([3, 5, 7, 9], ROWS)
    settings = gate_settings(reserved, "learned", tmp_path, teachers=2)
    processor = GateProcessorV2(engine_config(settings), states)
    for slot, params in enumerate([terms(2.0, *FREE), terms(2.0, -INF, INF), SamplingParams()]):
        processor.add_request(slot, params)
    processor.apply_staged_writes()
    logits = processor.apply(worth(*[(1.5, 2.6)] * 3), v2_runner.context([2, 1, 0], [20, 20, 20]))
    assert asked(logits) == [None, "small", "big"]


def test_scores_that_are_kept_are_common_prices(router_of_two, reserved, tmp_path):
    router_of_two.save(tmp_path)
    settings = gate_settings(reserved, "learned", tmp_path, teachers=2, sketch=True)
    processor = GateProcessor(engine_config(settings), CPU, False)
    processor.update_state(update(added=[(0, terms(9.0, *FREE), [])]))
    processor.apply(worth((1.5, 2.6)))
    assert processor.sketch.read().quantiles[-1] == pytest.approx(3.0)


def test_a_router_of_one_output_may_take_the_place_of_one_of_two(router, router_of_two, reserved, tmp_path):
    """A segment that began earlier still has the old router's terms. It asks by a row that is known."""
    processor = v1(router_of_two, reserved, tmp_path)
    processor.update_state(update(added=[(0, terms(2.0, *FREE), [])]))
    processor.gate = router.build_gate()
    assert asked(processor.apply(worth((2.5, 0.0)))) == ["big"]
