"""The calibration that learns while it serves, in a closed loop with the real policy and bucket."""

import math

import pytest

from router.adaptive import KNOTS, PRIOR_SCORES, AdaptiveCalibration, SavedState, SeenScores
from tests.helpers.scored_traffic import ScoredTraffic


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.2, 0.3, 0.5])
@pytest.mark.parametrize(
    ("gate", "scale", "after_teacher"),
    [("entropy", 0.3, -1.0), ("entropy", 3.0, 1.0), ("margin", 0.2, 0.0), ("learned", 0.01, -0.5)],
)
def test_the_rate_is_within_two_points_after_a_hundred_prompts(gate, scale, after_teacher, fraction):
    traffic = ScoredTraffic(gate, scale=scale, after_teacher=after_teacher)
    traffic.serve(fraction, 100)
    assert traffic.serve(fraction, 200) == pytest.approx(fraction, abs=0.02)


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_the_rate_holds_for_calls_of_several_tokens(fraction):
    traffic = ScoredTraffic("entropy", scale=0.5, after_teacher=0.5, ask_tokens=4)
    traffic.serve(fraction, 100)
    assert traffic.serve(fraction, 300) == pytest.approx(fraction, abs=0.02)


def test_a_restored_calibration_has_the_saved_prices():
    first = ScoredTraffic("entropy", scale=0.05, after_teacher=-2.0)
    first.serve(0.2, 200)
    saved = SavedState.model_validate_json(first.calibration.state.model_dump_json())
    second = AdaptiveCalibration("entropy", 1)
    assert second.restore(saved)
    assert second.points == first.calibration.points


def test_restored_scores_give_way_as_the_engine_sees_as_many():
    """The engine of a new process begins with an empty sketch."""
    first = AdaptiveCalibration("entropy", 1)
    first.see(SeenScores([5.0] * 257, 8000))
    second = AdaptiveCalibration("entropy", 1)
    assert second.restore(first.state)
    second.see(SeenScores([9.0] * 257, 80))
    assert second.price(0.1) == 5.0
    assert second.state.positions == 8000
    second.see(SeenScores([9.0] * 257, 8000))
    assert second.price(0.1) == 9.0
    assert second.state == first.state.model_copy(update={"quantiles": (9.0,) * 257})


def test_a_restored_rate_follows_the_others_no_more_than_before():
    """The 4,000 tokens at 0.5 still count: with 400 it would follow half as much, with 4,000 far less."""
    first = AdaptiveCalibration("random", 1)
    first.observe(0.5, 2000, 4000)
    second = AdaptiveCalibration("random", 1)
    assert second.restore(first.state)
    assert second.realised == first.realised
    for calibration in (first, second):
        calibration.observe(0.05, 84, 420)
    assert second.points == first.points


def test_a_state_of_an_older_version_is_taken():
    old = AdaptiveCalibration("margin", 1).state.model_dump(exclude={"counts"})
    assert AdaptiveCalibration("margin", 1).restore(SavedState.model_validate(old))


def test_a_state_of_another_gate_is_not_taken():
    calibration = AdaptiveCalibration("margin", 1)
    before = calibration.points
    assert not calibration.restore(AdaptiveCalibration("entropy", 1).state)
    assert calibration.points == before


def test_prices_never_rise_with_the_rate():
    traffic = ScoredTraffic("entropy", scale=1.0, after_teacher=0.0)
    for fraction in (0.5, 0.05, 0.2):
        traffic.serve(fraction, 50)
    prices = [traffic.calibration.price(step / 200) for step in range(1, 200)]
    assert prices == sorted(prices, reverse=True)


def test_zero_never_asks_and_one_always_does():
    calibration = AdaptiveCalibration("entropy", 1)
    assert (calibration.price(0.0), calibration.price(1.0)) == (math.inf, -math.inf)


def test_realised_rates_are_reported_for_what_was_aimed_at():
    calibration = AdaptiveCalibration("random", 1)
    calibration.observe(0.1, 20, 100)
    (realised,) = calibration.realised
    assert realised == (0.1, 0.2, 100)


def test_twice_the_aim_over_a_window_moves_the_correction_by_one():
    """The window is 400 tokens and 20 for the running request: 84 of 420 tokens, with an aim of 42."""
    calibration = AdaptiveCalibration("random", 1)
    calibration.observe(0.1, 84, 420)
    assert calibration.state.offsets[KNOTS.index(0.1)] == pytest.approx(-1.0)


def test_the_scores_of_every_prior_increase():
    for scores in PRIOR_SCORES.values():
        assert list(scores) == sorted(scores)
