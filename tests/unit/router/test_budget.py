import copy

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from router.budget import Bucket, Budget


def spend(bucket: Bucket, length: int, used: int, at_most: int = 1000) -> None:
    """Spend one span after ``length`` tokens; the teacher writes ``used`` tokens of it."""
    bucket.settle(bucket.reserve(length, at_most), used)


# What a budget may be


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, (0.0, None, None)),
        (1, (1.0, None, None)),
        (0.25, (0.25, None, None)),
        ({"fraction": 0.25}, (0.25, None, None)),
        ({"fraction": 1}, (1.0, None, None)),
        ({"tokens": 3.0, "calls": None}, (None, 3, None)),
        ({"tokens": 7}, (None, 7, None)),
        ({"calls": 0}, (None, None, 0)),
        ({"fraction": 0.5, "tokens": 7, "calls": 2}, (0.5, 7, 2)),
        ({"fraction": None, "tokens": 7}, (None, 7, None)),
    ],
)
def test_a_budget_is_a_fraction_or_its_parts(value, expected):
    budget = Budget.model_validate(value)
    assert (budget.fraction, budget.tokens, budget.calls) == expected


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (-0.1, "fraction"),
        (1.5, "fraction"),
        (float("nan"), "fraction"),
        (float("inf"), "fraction"),
        (10**400, "fraction"),
        ({"fraction": "0.1"}, "fraction"),
        ({"fraction": True}, "fraction"),
        ({"tokens": -1}, "tokens"),
        ({"tokens": 2.5}, "tokens"),
        ({"tokens": True}, "tokens"),
        ({"tokens": 2**63}, "tokens"),
        ({"calls": -1}, "calls"),
        ({"calls": "3"}, "calls"),
        ({"fraction": 0.1, "dollars": 3}, "dollars"),
    ],
)
def test_a_wrong_part_is_refused_by_name(value, part):
    with pytest.raises(ValidationError) as refusal:
        Budget.model_validate(value)
    assert [error["loc"] for error in refusal.value.errors()] == [(part,)]


@pytest.mark.parametrize("value", [{}, {"fraction": None}, {"fraction": None, "tokens": None, "calls": None}])
def test_a_budget_must_bound_something(value):
    with pytest.raises(ValidationError, match="set at least one of fraction, tokens, calls"):
        Budget.model_validate(value)


@pytest.mark.parametrize("value", [None, True, False, "0.1", "all", [], [0.1]])
def test_what_is_neither_a_number_nor_an_object_is_refused(value):
    with pytest.raises(ValidationError):
        Budget.model_validate(value)


def test_every_wrong_part_is_reported_at_once():
    with pytest.raises(ValidationError) as refusal:
        Budget.model_validate({"fraction": 2, "tokens": -1, "calls": 1.5})
    assert {error["loc"][0] for error in refusal.value.errors()} == {"fraction", "tokens", "calls"}


def test_a_budget_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Budget(tokens=3).tokens = 300


@pytest.mark.parametrize(
    ("budget", "zero"),
    [
        (Budget(fraction=0), True),
        (Budget(tokens=0), True),
        (Budget(fraction=1, calls=0), True),
        (Budget(fraction=1e-9), False),
        (Budget(fraction=0.1, tokens=1, calls=1), False),
    ],
)
def test_a_budget_with_a_zero_in_it_is_zero(budget, zero):
    assert budget.is_zero is zero
    assert (Bucket(budget, span_tokens=4).reserve(1000, 1000) is None) is zero


# What a bucket grants


def test_a_fraction_opens_a_span_as_the_completion_grows():
    bucket = Bucket(Budget(fraction=0.1), span_tokens=4)
    assert bucket.reserve(0, at_most=100).tokens == 4  # one span is free
    # 4 spent: 4 + 4 <= 0.1 * (length + 4) + 4 from a length of 36 on
    assert bucket.earliest() == 36
    assert bucket.reserve(35, at_most=60) is None
    assert bucket.reserve(36, at_most=60).tokens == 4
    assert bucket.earliest() == 76


def test_a_refused_span_costs_nothing():
    bucket = Bucket(Budget(fraction=0.1, calls=5), span_tokens=4)
    spend(bucket, 0, used=4)
    assert bucket.reserve(10, at_most=4) is None
    assert (bucket.spent, bucket.calls) == (4, 1)


def test_tokens_shorten_the_last_span():
    bucket = Bucket(Budget(tokens=6, calls=9), span_tokens=4)
    assert [bucket.reserve(50, at_most=100).tokens for _ in range(2)] == [4, 2]
    assert bucket.reserve(50, at_most=100) is None


def test_a_teacher_that_always_writes_gets_all_remaining_tokens_in_one_call():
    bucket = Bucket(Budget(tokens=50), span_tokens=4, ask_tokens=1)
    assert bucket.reserve(0, at_most=512, always=True).tokens == 50
    assert bucket.reserve(50, at_most=462, always=True) is None


def test_otherwise_a_call_has_as_many_tokens_as_the_student_asks_for():
    assert Bucket(Budget(tokens=50), span_tokens=4, ask_tokens=1).reserve(0, at_most=512).tokens == 1


@pytest.mark.parametrize("budget", [Budget(tokens=50, calls=9), Budget(fraction=0.5, tokens=50)])
def test_a_fraction_and_calls_go_call_by_call(budget: Budget):
    assert Bucket(budget, span_tokens=4, ask_tokens=2).reserve(0, at_most=512, always=True).tokens == 2


def test_unwritten_tokens_can_be_spent_again():
    bucket = Bucket(Budget(tokens=6, calls=9), span_tokens=4)
    spend(bucket, 0, used=1)
    assert bucket.tokens_left == 5
    assert bucket.reserve(50, at_most=100).tokens == 4


def test_calls_are_counted_even_when_nothing_was_written():
    bucket = Bucket(Budget(calls=2), span_tokens=4)
    spend(bucket, 0, used=0)
    spend(bucket, 9, used=0)
    assert bucket.earliest() is None
    assert bucket.reserve(50, at_most=100) is None


def test_a_span_is_no_longer_than_the_rest_of_the_completion():
    assert Bucket(Budget(fraction=0.5), span_tokens=4).reserve(10, at_most=3).tokens == 3
    assert Bucket(Budget(fraction=0.5), span_tokens=4).reserve(10, at_most=0) is None


@pytest.mark.parametrize(
    ("budget", "tokens"),
    [
        (Budget(fraction=1), 100),  # the teacher may write everything: one call does it
        (Budget(tokens=100), 100),
        (Budget(fraction=1, tokens=200), 100),
        (Budget(tokens=99), 4),  # not everything: in spans
        (Budget(fraction=1, calls=1), 4),
        (Budget(fraction=0.99), 4),
    ],
)
def test_a_budget_that_covers_the_rest_grants_it_in_one_span(budget, tokens):
    assert Bucket(budget, span_tokens=4).reserve(0, at_most=100).tokens == tokens


@pytest.mark.parametrize("fraction", [5e-324, 1e-300, 1e-20])
def test_a_tiny_fraction_buys_one_span(fraction):
    bucket = Bucket(Budget(fraction=fraction), span_tokens=4)
    spend(bucket, 0, used=1)
    assert bucket.reserve(10**9, at_most=4) is None


def test_settling_again_changes_nothing():
    bucket = Bucket(Budget(tokens=10), span_tokens=4)
    grant = bucket.reserve(0, at_most=100)
    for used in (1, 1, 4, 0):
        bucket.settle(grant, used)
        assert bucket.spent == 1


@pytest.mark.parametrize("used", [-1, 5])
def test_a_grant_cannot_be_settled_with_more_than_it_is(used):
    bucket = Bucket(Budget(tokens=10), span_tokens=4)
    grant = bucket.reserve(0, at_most=100)
    with pytest.raises(ValueError, match=f"a grant of 4 tokens cannot be settled with {used}"):
        bucket.settle(grant, used)
    assert bucket.spent == 4


def test_asking_for_less_than_a_span_starts_with_a_spans_credit():
    bucket = Bucket(Budget(fraction=0.1), span_tokens=4, ask_tokens=1)
    for _ in range(4):
        assert bucket.reserve(bucket.spent, at_most=10).tokens == 1
    # 4 tokens are spent: a fifth fits when 5 <= 0.1 * (length + 1) + 4, from length 9 on.
    assert bucket.earliest() == 9
    assert bucket.reserve(8, at_most=10) is None
    assert bucket.reserve(9, at_most=10).tokens == 1


def test_tokens_and_calls_are_counted_per_call():
    bucket = Bucket(Budget(tokens=3, calls=9), span_tokens=4, ask_tokens=2)
    assert [bucket.reserve(50, at_most=100).tokens for _ in range(2)] == [2, 1]
    assert bucket.calls_left == 7


def test_a_call_is_a_whole_span_unless_said_otherwise():
    assert Bucket(Budget(fraction=0.1), span_tokens=4).ask_tokens == 4


@pytest.mark.parametrize("ask_tokens", [0, -1, 5])
def test_a_call_is_no_longer_than_a_span_and_no_shorter_than_a_token(ask_tokens):
    with pytest.raises(ValueError, match=f"cannot ask for {ask_tokens} tokens of a span of 4"):
        Bucket(Budget(fraction=0.1), span_tokens=4, ask_tokens=ask_tokens)


# Any sequence of spans

fractions = st.one_of(st.floats(0, 1), st.sampled_from([0.05, 0.1, 0.2, 1 / 3, 1.0]))
budgets = st.builds(
    dict,
    fraction=st.none() | fractions,
    tokens=st.none() | st.integers(0, 60),
    calls=st.none() | st.integers(0, 12),
).filter(lambda parts: any(part is not None for part in parts.values()))
# (tokens by the student, most tokens of a span, how much of its grant the teacher uses)
turns = st.lists(st.tuples(st.integers(0, 25), st.integers(1, 40), st.floats(0, 1)), max_size=25)


@given(parts=budgets, span_tokens=st.integers(1, 8), ask_tokens=st.integers(1, 8), turns=turns)
def test_no_prefix_of_any_completion_is_above_its_budget(parts, span_tokens, ask_tokens, turns):
    budget = Budget.model_validate(parts)
    bucket = Bucket(budget, span_tokens, min(ask_tokens, span_tokens))
    completion = teacher = calls = 0
    for student, at_most, use in turns:
        completion += student
        grant = bucket.reserve(completion, at_most)
        if grant is None:
            continue
        calls += 1
        assert 1 <= grant.tokens <= at_most
        used = round(use * grant.tokens)
        for _ in range(used):
            completion, teacher = completion + 1, teacher + 1
            if budget.fraction is not None:
                assert teacher <= budget.fraction * completion + span_tokens + 1e-9
            assert budget.tokens is None or teacher <= budget.tokens
        bucket.settle(grant, used)
        bucket.settle(grant, used)
        assert (bucket.spent, bucket.calls) == (teacher, calls)
        assert budget.calls is None or calls <= budget.calls


@given(parts=budgets, span_tokens=st.integers(1, 8), ask_tokens=st.integers(1, 8), turns=turns)
@example(
    parts={"fraction": 1.1e-279, "tokens": None, "calls": None},
    span_tokens=1,
    ask_tokens=1,
    turns=[(0, 1, 1.0)] * 2,
)
def test_earliest_is_the_first_length_at_which_a_call_is_granted(parts, span_tokens, ask_tokens, turns):
    budget = Budget.model_validate(parts)
    bucket = Bucket(budget, span_tokens, min(ask_tokens, span_tokens))
    completion = 0
    for student, at_most, use in turns:
        completion += student
        earliest = bucket.earliest()
        if earliest is None:
            assert copy.copy(bucket).reserve(10**9, at_most) is None
            return
        assert copy.copy(bucket).reserve(earliest, at_most) is not None
        if earliest > 0:
            assert copy.copy(bucket).reserve(earliest - 1, at_most) is None
            # and no later than needed: a call that began one token earlier could end above the bound
            end = earliest - 1 + bucket.ask_tokens
            assert bucket.spent + bucket.ask_tokens > budget.fraction * end + span_tokens
        if completion >= earliest:
            spend(bucket, completion, used=round(use))
            completion += round(use)
