import math
import os
from pathlib import Path

import pytest
import torch

from router.feature_layout import LOG_PROB_FLOOR
from router.features import (
    best_probability,
    confidence,
    entropy,
    features,
    margin,
    n_features,
)
from router.gate import GATES
from router.loops import LANES, features_loop
from router.reserved import ReservedRows

# The `reserved` fixture has ten visible tokens, the escalation token and three taps.
ROWS = 14
TAPS, TOP, ENTROPY, MARGIN = slice(0, 3), slice(3, 11), 11, 12


def test_a_flat_distribution_has_the_largest_entropy(reserved):
    x = features(torch.zeros(ROWS), reserved)
    assert torch.allclose(x[TOP], torch.full((8,), -math.log(10)))
    assert x[ENTROPY].item() == pytest.approx(math.log(10))
    assert x[MARGIN].item() == 0


def test_two_equal_tokens_have_an_entropy_of_log_2(reserved):
    logits = torch.full((ROWS,), -math.inf)
    logits[[3, 7]] = 5.0
    x = features(logits, reserved)
    assert torch.allclose(x[TOP][:2], torch.tensor(0.5).log())
    assert (x[TOP][2:] == LOG_PROB_FLOOR).all()
    assert x[ENTROPY].item() == pytest.approx(math.log(2))
    assert x[MARGIN].item() == 0


def test_the_margin_is_the_gap_of_the_two_best_log_probabilities(reserved):
    logits = torch.zeros(ROWS)
    logits[4], logits[9] = 3.0, 1.0
    x = features(logits, reserved)
    assert x[MARGIN].item() == pytest.approx(2.0)
    assert (x[TOP][0] - x[TOP][1]).item() == pytest.approx(2.0)


def test_taps_are_passed_on_as_they_are(reserved):
    logits = torch.zeros(ROWS)
    logits[11:] = torch.tensor([7.0, -8.0, 9.0])
    assert features(logits, reserved)[TAPS].tolist() == [7.0, -8.0, 9.0]


def test_reserved_rows_are_no_tokens(reserved):
    logits = torch.zeros(ROWS)
    logits[10:] = 50.0
    x = features(logits, reserved)
    assert torch.allclose(x[3:], features(torch.zeros(ROWS), reserved)[3:])


def test_the_escalation_row_is_no_feature(reserved):
    logits = torch.randn(ROWS, generator=torch.Generator().manual_seed(0))
    other = logits.clone()
    other[reserved.escalation] = 99.0
    assert torch.equal(features(logits, reserved), features(other, reserved))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_have_one_row_for_each_position_in_float32(reserved, shape, dtype):
    x = features(torch.zeros(*shape, ROWS, dtype=dtype), reserved)
    assert x.shape == (*shape, n_features(reserved))
    assert x.dtype == torch.float32


def test_the_length_counts_taps_top_log_probabilities_entropy_and_margin():
    assert n_features(ReservedRows(start=100, count=32)) == 31 + 8 + 2
    assert n_features(ReservedRows(start=100, count=1)) == 0 + 8 + 2


@pytest.mark.parametrize("allowed", [1, 2, 7, 8, 10])
def test_masked_tokens_give_finite_features(reserved, allowed):
    logits = torch.zeros(ROWS)
    logits[allowed : reserved.start] = -math.inf
    x = features(logits, reserved)
    assert x.isfinite().all()
    assert x[ENTROPY].item() == pytest.approx(math.log(allowed))
    assert x[MARGIN].item() == pytest.approx(0 if allowed > 1 else -LOG_PROB_FLOOR)


def test_a_row_does_not_depend_on_its_neighbours(reserved):
    logits = torch.randn(5, ROWS, generator=torch.Generator().manual_seed(0))
    batch = features(logits, reserved)
    assert all(torch.allclose(batch[i], features(logits[i], reserved)) for i in range(5))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("visible", [10, 1000, 1500])
def test_features_agree_with_their_definitions(scale, visible, gradients):
    """The features agree with their definitions in double precision, with masked tokens.

    The best tokens are in several blocks or in one. Without gradients compiled loops compute the features,
    with gradients torch.
    """
    rows = ReservedRows(start=visible, count=4)
    logits = scale * torch.randn(6, visible + 4, generator=torch.Generator().manual_seed(0))
    logits[1, 2 : visible - 1] = -math.inf
    logits[2, :9] += 50.0
    log_probs = logits[:, :visible].double().log_softmax(-1)
    top = log_probs.topk(8).values.clamp(min=LOG_PROB_FLOOR)
    entropies = torch.special.entr(log_probs.exp()).sum(-1, keepdim=True)
    expected = torch.cat((logits[:, rows.taps].double(), top, entropies, top[:, :1] - top[:, 1:2]), dim=-1)
    logits.requires_grad_(gradients)
    assert torch.allclose(features(logits, rows).double(), expected, atol=5e-6, rtol=0)
    assert torch.equal(confidence(logits, rows), features(logits, rows)[:, rows.count - 1 :])
    assert torch.allclose(entropy(logits, rows)[:, None].double(), entropies, atol=5e-6, rtol=0)
    assert torch.allclose(
        best_probability(logits, rows).double(), log_probs.amax(-1).exp(), atol=1e-6, rtol=0
    )
    gap = logits[:, :visible].topk(2).values
    assert torch.allclose(margin(logits, rows), gap[:, 0] - gap[:, 1])


def test_gradients_reach_the_logits(reserved):
    logits = torch.randn(2, ROWS, generator=torch.Generator().manual_seed(0), requires_grad=True)
    features(logits, reserved)[:, ENTROPY].sum().backward()
    p = logits.detach()[:, :10].softmax(-1)
    expected = -p * (p.log() + torch.special.entr(p).sum(-1, keepdim=True))
    assert torch.allclose(logits.grad[:, :10], expected, atol=1e-6)


@pytest.mark.parametrize("name", GATES)
def test_a_gate_leaves_the_logits_as_they_were(reserved, name):
    torch.manual_seed(0)
    logits = torch.randn(3, reserved.end)
    before = logits.clone()
    GATES[name](reserved).eval()(logits)
    assert torch.equal(logits, before)


def test_a_part_of_a_tensor_gives_what_the_whole_row_gives(reserved):
    torch.manual_seed(0)
    wide = torch.randn(4, reserved.end + 6)
    part = wide[:, : reserved.end]  # its rows are apart in memory
    torch.testing.assert_close(features(part, reserved), features(part.clone(), reserved))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_features_are_exact_for_a_real_vocabulary(scale):
    rows = ReservedRows(start=151_904)
    logits = scale * torch.randn(2, rows.end, generator=torch.Generator().manual_seed(0))
    log_probs = logits[:, : rows.start].double().log_softmax(-1)
    entropies = torch.special.entr(log_probs.exp()).sum(-1)
    assert torch.allclose(entropy(logits, rows).double(), entropies, atol=2e-5, rtol=0)
    top = log_probs.topk(8).values
    assert torch.allclose(confidence(logits, rows)[:, :8].double(), top, atol=2e-5, rtol=0)


@pytest.mark.parametrize("places", [range(3, 3 + 9 * LANES, LANES), range(9), [0, LANES - 1, 10 * LANES]])
def test_the_best_are_found_wherever_they_are(places):
    """The best tokens are in one lane, in a lane each, or at the ends."""
    rows = ReservedRows(start=10 * LANES + 1, count=1)
    logits = torch.zeros(rows.end)
    logits[list(places)] = torch.arange(1.0, len(places) + 1)
    best = logits[: rows.start].topk(8).values
    found = confidence(logits, rows)[:8]
    assert torch.allclose(found - found[0], best - best[0], atol=1e-6)


def test_a_row_of_equal_logits_longer_than_the_lanes(reserved):
    rows = ReservedRows(start=3 * LANES, count=4)
    x = confidence(torch.full((rows.end,), 7.0), rows)
    assert torch.allclose(x[:9], torch.tensor([-math.log(3 * LANES)] * 8 + [math.log(3 * LANES)]))


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
def test_without_a_largest_logit_there_is_no_confidence(reserved, value):
    logits = torch.full((ROWS,), value)
    assert entropy(logits, reserved).isnan()
    assert best_probability(logits, reserved).isnan()
    assert confidence(logits, reserved)[8].isnan()


def test_compiled_loops_are_kept_where_numba_is_told_to():
    assert Path(features_loop.stats.cache_path).is_relative_to(os.environ["NUMBA_CACHE_DIR"])
