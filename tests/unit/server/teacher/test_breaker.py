from server.teacher.breaker import Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_failures_in_a_row_open_the_breaker():
    breaker = Breaker(3, 10.0, Clock())
    for _ in range(2):
        breaker.failed()
        assert not breaker.open
        assert breaker.allow()
    breaker.failed()
    assert breaker.open
    assert not breaker.allow()
    assert breaker.tripped


def test_a_success_starts_the_count_anew():
    breaker = Breaker(2, 10.0, Clock())
    for _ in range(5):
        breaker.failed()
        breaker.succeeded()
    breaker.failed()
    assert not breaker.open


def opened(clock: Clock) -> Breaker:
    breaker = Breaker(1, 10.0, clock)
    breaker.failed()
    return breaker


def test_an_open_breaker_lets_one_trial_through():
    clock = Clock()
    breaker = opened(clock)
    clock.now += 9.9
    assert breaker.open
    clock.now += 0.2
    assert not breaker.open
    assert [breaker.allow() for _ in range(3)] == [True, False, False]
    assert breaker.open


def test_a_trial_that_succeeds_closes_it():
    clock = Clock()
    breaker = opened(clock)
    clock.now += 11
    assert breaker.allow()
    breaker.succeeded()
    assert not breaker.open
    assert [breaker.allow() for _ in range(3)] == [True] * 3
    assert not breaker.tripped


def test_a_trial_that_fails_opens_it_anew():
    clock = Clock()
    breaker = opened(clock)
    clock.now += 11
    assert breaker.allow()
    clock.now += 5
    breaker.failed()
    clock.now += 9
    assert not breaker.allow()
    clock.now += 2
    assert breaker.allow()


def test_a_trial_without_an_outcome_is_followed_by_another():
    """The trial's client may have left. Then the trial says nothing about the teacher."""
    clock = Clock()
    breaker = opened(clock)
    clock.now += 11
    assert breaker.allow()
    clock.now += 11
    assert breaker.allow()
