"""The parts of a teacher call's time."""

import pytest

from server.bench.results import spreads
from server.bench.teacher_call import COLUMNS, Calls, _parts_row


def test_the_rest_of_a_calls_time_is_the_front_ends() -> None:
    """Calls of 20 and 40 ms take 30 on average. We take 2 of them and the engine takes 8."""
    calls = Calls([0.020, 0.040], own=0.002, engine=0.008)
    found = {title: spread.median for title, spread in spreads([calls], COLUMNS).items()}
    assert found["ms a call"] == pytest.approx(30)
    assert found["gateway"] == pytest.approx(2)
    assert found["teacher's engine"] == pytest.approx(8)
    assert found["teacher's front end"] == pytest.approx(20)


def test_a_part_is_the_time_that_it_adds_to_the_fastest_call() -> None:
    sides = []
    for fastest in (0.012, 0.009, 0.008, 0.003):
        sides.append([Calls([0.5, fastest + 0.001], 0.0, 0.0), Calls([fastest, 0.2], 0.0, 0.0)])
    row = _parts_row(100, sides)
    assert row["completion"] == pytest.approx(12)
    assert row["echo"] == pytest.approx(3)
    assert row["text"] == pytest.approx(5)
    assert row["token ids alone"] == pytest.approx(3)
