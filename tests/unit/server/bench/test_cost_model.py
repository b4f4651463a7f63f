"""The cost model, in numbers that can be computed by hand."""

import pytest

from server.bench.cost_model import Line, StepCosts, Traffic
from server.bench.quality import interpolate


def test_a_fit_finds_the_line_of_its_points() -> None:
    line = Line.fit([(1, 5.0), (4, 11.0), (16, 35.0)])
    assert (line.fixed, line.each) == (pytest.approx(3.0), pytest.approx(2.0))


def test_a_fitted_line_has_no_negative_costs() -> None:
    assert Line.fit([(1, 5.0), (4, 4.0)]).each == 0.0
    assert Line.fit([(1, 1.0), (2, 3.0)]).fixed == 0.0


def test_points_with_one_x_are_refused() -> None:
    with pytest.raises(ValueError, match="two different x"):
        Line.fit([(1, 5.0), (1, 4.0)])


COSTS = StepCosts(
    student_step=Line(4.0, 1.0),
    student_read=0.5,
    teacher_step=Line(40.0, 4.0),
    teacher_read=2.0,
    front=0.01,
    block=32,
)


def test_the_costs_of_a_request_are_computed_by_hand() -> None:
    """A request of 100 tokens, 20 of them the teacher's in 5 calls, with a prompt of 50, in batches of 4."""
    traffic = Traffic(50, 100, 0.2, 4)
    assert traffic.calls == 5
    assert COSTS.student(traffic, 4) == pytest.approx(80 * 2.0 + (50 + 20 + 5 * 16) * 0.5)
    assert COSTS.teacher(traffic, 4) == pytest.approx(20 * 14.0 + (50 + 80 + 5 * 16) * 2.0)
    assert COSTS.requests_per_second(traffic, 4) == pytest.approx(1 / 700)


def test_a_teacher_that_is_never_asked_costs_nothing() -> None:
    assert COSTS.teacher(Traffic(50, 100, 0.0), 4) == 0.0


def test_a_curve_is_anchored_at_both_models() -> None:
    assert interpolate([(0.2, 0.8)], 0.05) == pytest.approx(0.2)
    assert interpolate([(0.2, 0.8)], 0.6) == pytest.approx(0.9)
