"""The calibration that learns while it serves, in a closed loop with the real policy and bucket."""

import math
import random

import pytest

from router.adaptive import KNOTS, PRIOR_SCORES, AdaptiveCalibration, SavedState, SeenScores
from router.budget import Bucket, Budget
from router.policy import Policy

TOKENS = 24


class Traffic:
    """Completions whose scores depend on who wrote the token before; the engine's sketch beside them."""

    def __init__(
        self, gate: str, *, scale: float, after_teacher: float, ask_tokens: int = 1, seed: int = 0
    ) -> None:
        self.calibration = AdaptiveCalibration(gate, ask_tokens)
        self.policy = Policy(self.calibration, expected_tokens=TOKENS)
        self.ask_tokens = ask_tokens
        self.rng = random.Random(seed)
        self.scale, self.after_teacher = scale, after_teacher
        self.scores: list[float] = []

    def score(self, teacher_before: bool) -> float:
        shift = self.after_teacher if teacher_before else 0.0
        value = math.exp(self.rng.gauss(shift, 1.5)) * self.scale
        return -1.0 / value if self.calibration.gate == "margin" else value

    def complete(self, fraction: float) -> tuple[int, int]:
        """Teacher tokens and all tokens of one completion."""
        bucket = Bucket(Budget(fraction=fraction), span_tokens=4, ask_tokens=self.ask_tokens)
        length = self.rng.randint(TOKENS // 2, TOKENS * 3 // 2)
        written = teacher = 0
        teacher_before = False
        while written < length:
            terms = self.policy.terms(bucket, written, length)
            asked = False
            start = written
            while written < length and not asked:
                score = self.score(teacher_before)
                if written - start >= terms.not_before and terms.price < math.inf:
                    self.scores.append(score)
                    asked = score > terms.price
                if not asked:
                    written += 1
                    teacher_before = False
            if asked:
                grant = bucket.reserve(written, length - written)
                assert grant is not None
                teacher += grant.tokens
                written += grant.tokens
                teacher_before = True
            assert teacher <= fraction * written + bucket.span_tokens
        return teacher, written

    def serve(self, fraction: float, completions: int) -> float:
        """The realised rate."""
        teacher = written = 0
        for number in range(completions):
            by_teacher, tokens = self.complete(fraction)
            self.calibration.observe(fraction, by_teacher, tokens)
            teacher += by_teacher
            written += tokens
            if number % 25 == 0:
                self.show_scores()
        return teacher / written

    def show_scores(self) -> None:
        """What the gateway reads from the engine every now and then."""
        recent = sorted(self.scores[-8192:])
        if recent:
            steps = [recent[len(recent) * step // 256] for step in range(256)]
            self.calibration.see(SeenScores(steps, len(recent)))


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.2, 0.3, 0.5])
@pytest.mark.parametrize(
    ("gate", "scale", "after_teacher"),
    [("entropy", 0.3, -1.0), ("entropy", 3.0, 1.0), ("margin", 0.2, 0.0), ("learned", 0.01, -0.5)],
)
def test_the_rate_is_within_two_points_after_a_hundred_prompts(gate, scale, after_teacher, fraction):
    traffic = Traffic(gate, scale=scale, after_teacher=after_teacher)
    traffic.serve(fraction, 100)
    assert traffic.serve(fraction, 200) == pytest.approx(fraction, abs=0.02)


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_it_holds_for_calls_of_several_tokens(fraction):
    traffic = Traffic("entropy", scale=0.5, after_teacher=0.5, ask_tokens=4)
    traffic.serve(fraction, 100)
    assert traffic.serve(fraction, 300) == pytest.approx(fraction, abs=0.02)


def test_it_goes_on_where_it_was_saved():
    first = Traffic("entropy", scale=0.05, after_teacher=-2.0)
    first.serve(0.2, 200)
    saved = SavedState.model_validate_json(first.calibration.state.model_dump_json())
    second = AdaptiveCalibration("entropy", 1)
    assert second.restore(saved)
    assert second.points == first.calibration.points


def test_a_state_of_another_gate_is_not_taken():
    calibration = AdaptiveCalibration("margin", 1)
    before = calibration.points
    assert not calibration.restore(AdaptiveCalibration("entropy", 1).state)
    assert calibration.points == before


def test_prices_never_rise_with_the_rate():
    traffic = Traffic("entropy", scale=1.0, after_teacher=0.0)
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
    """The window is 400 tokens and 20 for the running request: 84 of 420 where 42 were aimed at."""
    calibration = AdaptiveCalibration("random", 1)
    calibration.observe(0.1, 84, 420)
    assert calibration.state.offsets[KNOTS.index(0.1)] == pytest.approx(-1.0)


def test_every_prior_rises():
    for scores in PRIOR_SCORES.values():
        assert list(scores) == sorted(scores)
