"""The price controller: its arithmetic by hand, and its worth on shifting traffic."""

import math

import pytest

from router.controller import AIM, EVENLY, GAIN, JUMP, PriceController, RateController
from router.ledger import FractionOfTraffic, Scope, Status, TokensPerWindow
from router.policy import Calibration
from tests.helpers.traffic import (
    SPAN,
    Traffic,
    calibrate,
    controlled,
    first_come,
    fixed_price,
    fixed_schedule,
    run,
)

TENTH = FractionOfTraffic(fraction=0.1, window_seconds=3600)
HOURLY = TokensPerWindow(tokens=36_000, window_seconds=3600)
CALIBRATION = Calibration(((0.01, 9.0), (0.1, 5.0), (0.5, 1.0)))


def status(
    limit: FractionOfTraffic | TokensPerWindow, spent: int, student: int, kind: str = "global"
) -> Status:
    """The status of a scope whose whole life is within the window."""
    return Status(Scope(kind, "", limit), spent, 0, student, spent, student, 0.0, 0.0)


def controller(limit: FractionOfTraffic | TokensPerWindow) -> RateController:
    return RateController(limit, lowest=0.01, highest=0.5, span_tokens=4)


def test_the_rate_starts_at_the_fraction() -> None:
    rates = controller(TENTH)
    rates.update(0.0, status(TENTH, 0, 0))
    assert rates.rate == pytest.approx(AIM * 0.1)


def test_the_rate_moves_against_the_error() -> None:
    """90 of 1,000 new tokens are the teacher's and 98 were allowed. A window allows 9,800 of 100,000."""
    rates = controller(TENTH)
    rates.update(0.0, status(TENTH, 9_910, 89_090))
    rates.update(1.0, status(TENTH, 10_000, 90_000))
    assert rates.u == pytest.approx(GAIN * (98 - 90) / 9_800)
    assert rates.rate == pytest.approx(AIM * 0.1 * math.exp(rates.u))


def test_the_rate_stays_if_it_is_on_target() -> None:
    rates = controller(TENTH)
    for second in range(100):
        rates.update(float(second), status(TENTH, 98 * second, 902 * second))
    assert rates.u == pytest.approx(0.0, abs=1e-9)


def test_the_rate_does_not_wind_up() -> None:
    """While nobody asks for hours, the rate stops at the calibrated end. It comes back from there at once."""
    rates = controller(TENTH)
    for second in range(10_000):
        rates.update(float(second), status(TENTH, 0, 1000 * second))
    assert rates.rate == pytest.approx(0.5)
    rates.update(10_000.0, status(TENTH, 5000, 9_999_000))
    assert rates.rate < 0.5


def test_one_update_moves_the_rate_by_a_bounded_step() -> None:
    rates = controller(TENTH)
    rates.update(0.0, status(TENTH, 0, 0))
    rates.update(60.0, status(TENTH, 50_000, 50_000))
    assert rates.u == -JUMP


def test_a_small_budget_moves_slowly() -> None:
    """A window allows only 98 tokens: one span of 4 moves the logarithm by 1/20, not by 4."""
    rates = controller(TENTH)
    rates.update(0.0, status(TENTH, 96, 904))
    rates.update(1.0, status(TENTH, 100, 900))
    assert rates.u == pytest.approx(-0.05)


def test_tokens_are_planned_over_the_expected_traffic() -> None:
    """The models write 100 tokens a second, 360,000 an hour: 36,000 are a tenth of them."""
    rates = controller(HOURLY)
    for second in range(1000):
        rates.update(float(second), status(HOURLY, 10 * second, 90 * second))
    assert rates.target == pytest.approx(EVENLY * 0.1)


def test_tokens_may_be_spent_in_a_burst() -> None:
    """All traffic of each hour is 100,000 tokens in one minute. Once that is known, the rate is 36 %."""
    rates = controller(HOURLY)
    scope = Scope("tenant", "", HOURLY)
    rates.update(0.0, Status(scope, 0, 0, 100_000, 0, 100_000, 0.0, 0.0))
    rates.update(3600.0, Status(scope, 0, 0, 100_000, 0, 200_000, 0.0, 0.0))
    assert rates.target == pytest.approx(EVENLY * 0.36)


def test_a_limit_that_covers_all_traffic_does_not_bind() -> None:
    rates = controller(HOURLY)
    for second in range(10):
        rates.update(float(second), status(HOURLY, second, second))
    assert rates.rate == 1.0


def test_a_ledger_that_lost_its_counts_starts_anew() -> None:
    rates = controller(TENTH)
    rates.update(0.0, status(TENTH, 10_000, 90_000))
    rates.update(1.0, status(TENTH, 0, 0))
    assert rates.u == 0.0
    rates.update(2.0, status(TENTH, 98, 902))
    assert rates.u == pytest.approx(0.0)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_fractions_of_0_and_1_are_the_rate_itself(fraction: float) -> None:
    limit = FractionOfTraffic(fraction=fraction, window_seconds=60)
    rates = controller(limit)
    for second in range(5):
        rates.update(float(second), status(limit, 100 * second, 100 * second))
    assert rates.rate == fraction


def test_the_tightest_limit_makes_the_price() -> None:
    prices = PriceController(CALIBRATION, span_tokens=4)
    tenant = Scope("tenant", "", TENTH)
    everybody = Scope("global", "", FractionOfTraffic(fraction=0.5 / AIM, window_seconds=3600))
    assert prices.price([tenant, everybody]) == -math.inf, "nothing known, nothing priced"
    prices.update(0.0, [status(TENTH, 0, 0, "tenant"), status(everybody.limit, 0, 0)])
    assert prices.rate([tenant, everybody]) == pytest.approx(AIM * 0.1)
    assert prices.rate([everybody]) == pytest.approx(0.5)
    assert prices.price([everybody]) == pytest.approx(1.0)
    assert prices.price([]) == -math.inf


def test_priority_scales_the_rate_under_a_global_limit_only() -> None:
    prices = PriceController(CALIBRATION, span_tokens=4)
    everybody, tenant = Scope("global", "", TENTH), Scope("tenant", "", TENTH)
    prices.update(0.0, [status(TENTH, 0, 0), status(TENTH, 0, 0, "tenant")])
    assert prices.rate([everybody], weight=0.5) == pytest.approx(AIM * 0.05)
    assert prices.rate([tenant], weight=0.5) == pytest.approx(AIM * 0.1)


def test_a_changed_limit_is_a_new_controller() -> None:
    prices = PriceController(CALIBRATION, span_tokens=4)
    prices.update(0.0, [status(TENTH, 0, 0)])
    half = FractionOfTraffic(fraction=0.05, window_seconds=3600)
    prices.update(1.0, [status(half, 0, 0)])
    assert prices.rate([Scope("global", "", half)]) == pytest.approx(AIM * 0.05)


def test_the_controller_meets_the_rate_and_gains_more_than_its_rivals() -> None:
    """The limit is 15 % over 2.5 minutes. The traffic of 7.5 minutes shifts from easy to hard and back."""
    traffic = Traffic(seed=1, steps=9000, streams=20, shifts=(0.5, 0.1, 0.9, 0.3))
    limit = FractionOfTraffic(fraction=0.15, window_seconds=150, slack_tokens=SPAN)
    calibration = calibrate()
    ours, first, price, schedule = (
        run(traffic, limit, spend, calibration, own=0.8)
        for spend in (controlled, first_come, fixed_price(0.15), fixed_schedule(0.15))
    )
    for outcome in (ours, first, price, schedule):
        assert outcome.worst_excess <= 1e-6
    assert len(ours.rates) > 500
    assert all(rate == pytest.approx(0.15, abs=0.01) for rate in ours.rates)
    assert ours.value > 1.05 * max(first.value, price.value, schedule.value)
