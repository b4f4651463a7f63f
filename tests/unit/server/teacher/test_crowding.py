"""The bound on concurrent calls at a crowded teacher."""

import pytest

from server.teacher.crowding import Crowding

pytestmark = pytest.mark.steady_time


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_queue_halves_the_bound_once_for_all_calls_in_it():
    clock = Clock()
    crowding = Crowding(1024, clock)
    clock.now = 10.0
    for running_now in range(200, 150, -1):
        crowding.gave_up(running_now, waited=10.0)
    assert crowding.limit == 100
    clock.now = 21.0
    crowding.first_token(100, waited=6.0, longest=10.0)
    assert crowding.limit == 50


def test_quick_first_tokens_raise_the_bound_again_up_to_its_most():
    crowding = Crowding(8)
    crowding.gave_up(4, waited=1.0)
    limits = []
    for _ in range(8):
        crowding.first_token(1, waited=0.1, longest=10.0)
        limits.append(crowding.limit)
    assert limits == [3, 4, 5, 6, 7, 8, 8, 8]


def test_a_bound_leaves_one_call():
    crowding = Crowding(4)
    crowding.gave_up(1, waited=1.0)
    assert crowding.limit == 1
