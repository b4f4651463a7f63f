import math

import pytest
import torch

from router.features import features, n_features
from router.gate import CONFIDENCE_GATES, GATES, LearnedGate, TeachersGate
from router.gate_names import GATE_NAMES

ROWS = 14  # of the `reserved` fixture
READING_LOGITS = [name for name in CONFIDENCE_GATES if name != "random"]


def peaked(height: float) -> torch.Tensor:
    """Logits of ten visible tokens, one of them ``height`` above the others."""
    logits = torch.zeros(ROWS)
    logits[2] = height
    return logits


def test_the_names_that_a_configuration_may_have_are_those_of_the_gates():
    assert tuple(GATES) == GATE_NAMES


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_one_float_for_every_position(reserved, name, shape):
    score = GATES[name](reserved)(torch.zeros(*shape, ROWS, dtype=torch.bfloat16))
    assert score.shape == shape
    assert score.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "score"),
    [("entropy", math.log(10)), ("margin", 0.0), ("max_probability", -0.1)],
)
def test_the_score_of_a_flat_distribution(reserved, name, score):
    assert GATES[name](reserved)(torch.zeros(ROWS)).item() == pytest.approx(score)


def test_the_score_of_a_known_distribution(reserved):
    logits = torch.full((ROWS,), -math.inf)
    logits[:3] = torch.tensor([0.5, 0.25, 0.25]).log()
    assert GATES["entropy"](reserved)(logits).item() == pytest.approx(1.5 * math.log(2))
    assert GATES["margin"](reserved)(logits).item() == pytest.approx(-math.log(2))
    assert GATES["max_probability"](reserved)(logits).item() == pytest.approx(-0.5)


@pytest.mark.parametrize("name", READING_LOGITS)
def test_the_less_certain_the_higher_the_score(reserved, name):
    gate = GATES[name](reserved)
    scores = [gate(peaked(height)).item() for height in (0.0, 0.5, 1.0, 2.0, 5.0, 9.0)]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)


@pytest.mark.parametrize("name", READING_LOGITS)
def test_reserved_rows_do_not_influence_confidence(reserved, name):
    gate, logits = GATES[name](reserved), torch.randn(6, ROWS, generator=torch.Generator().manual_seed(0))
    other = logits.clone()
    other[:, reserved.start :] = torch.tensor([99.0, -99.0, 50.0, math.inf])
    assert torch.equal(gate(logits), gate(other))


@pytest.mark.parametrize("name", READING_LOGITS)
def test_a_mask_is_no_obstacle(reserved, name):
    logits = torch.full((ROWS,), -math.inf)
    logits[:2] = 0.0
    score = GATES[name](reserved)(logits).item()
    assert score == pytest.approx({"entropy": math.log(2), "margin": 0.0, "max_probability": -0.5}[name])


def test_the_random_gate_asks_with_probability_one_minus_price(reserved):
    torch.manual_seed(0)
    scores = GATES["random"](reserved)(torch.zeros(20_000, ROWS))
    assert scores.min() >= 0
    assert scores.max() < 1
    for price in (0.0, 0.3, 0.9):
        assert (scores > price).float().mean().item() == pytest.approx(1 - price, abs=0.015)


# The learned gate


def test_the_learned_gate_reads_features(router, reserved):
    gate = router.build_gate()
    logits = torch.zeros(3, ROWS)
    logits[:, 11] = torch.tensor([2.5, 0.0, -1.5])  # the fixture's gate scores by its first tap
    assert gate(logits).tolist() == pytest.approx([2.5, 0.0, -1.5])
    assert torch.equal(gate(logits), gate.score(features(logits, reserved)))


def test_features_are_normalised_by_the_gates_buffers(router):
    gate = router.build_gate()
    gate.mean[0], gate.scale[0] = 1.0, 2.0
    logits = torch.zeros(ROWS)
    logits[11] = 2.5
    assert gate(logits).item() == pytest.approx((2.5 - 1.0) * 2.0)


def test_normalisation_is_part_of_the_gates_state(reserved):
    state = LearnedGate(reserved, width=8).state_dict()
    assert state["mean"].shape == state["scale"].shape == (n_features(reserved),)


def test_the_width_is_read_off_the_network(reserved):
    assert LearnedGate(reserved, width=24).width == 24


def test_an_untrained_gate_can_be_trained(reserved):
    torch.manual_seed(0)
    gate = LearnedGate(reserved, width=8)
    gate(torch.randn(4, ROWS)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in gate.parameters())


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
@pytest.mark.parametrize("costs", [[], [0.25, 1.0]])
def test_a_frozen_gate_scores_as_before(reserved, shape, costs):
    torch.manual_seed(0)
    gate = TeachersGate(reserved, 8, costs) if costs else LearnedGate(reserved, 8)
    gate.mean.normal_()
    gate.scale.uniform_(0.5, 2.0)
    logits = torch.randn(*shape, ROWS) * 3
    with torch.no_grad():
        before = gate(logits)
        torch.testing.assert_close(gate.freeze()(logits), before, atol=2e-6, rtol=1e-5)


def test_what_is_frozen_does_not_change_with_the_network(reserved):
    gate = LearnedGate(reserved, 8).freeze()
    logits = torch.randn(3, ROWS, generator=torch.Generator().manual_seed(0))
    before = gate(logits)
    gate.mean.fill_(5.0)
    assert torch.equal(gate(logits), before)
    assert not before.requires_grad
