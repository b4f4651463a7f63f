"""Budgets that name teachers: the teachers they allow, a key's maximum, and the tokens of a call."""

import pytest
from pydantic import ValidationError

from router.budget import Bounds, Bucket, Budget
from router.ledger import Scope, TokensPerWindow
from router.money import TokenPrices

CHEAP = TokenPrices(input=1, output=2)
DEAR = TokenPrices(input=2, output=10)
TENTH = {"fraction": 0.1}


def budget(**parts: object) -> Budget:
    return Budget.model_validate(parts)


def test_names_may_be_a_list_or_have_bounds() -> None:
    assert budget(fraction=0.1, teachers=["a", "b"]).teachers == {"a": None, "b": None}
    each = budget(teachers={"a": 0.1, "b": {"calls": 2}})
    assert each.own("a") == Bounds(fraction=0.1)
    assert each.own("b") == Bounds(calls=2)
    assert each.own("c") is None


@pytest.mark.parametrize(
    "parts",
    [
        {"teachers": ["a"]},
        {"teachers": {"a": None, "b": 0.1}},
        {"fraction": 0.1, "teachers": []},
        {"fraction": 0.1, "teachers": ["a", "a"]},
        {"fraction": 0.1, "teachers": {"a b": 0.1}},
        {"fraction": 0.1, "teachers": "a"},
        {"teachers": {"a": {"teachers": ["b"]}}},
    ],
)
def test_a_budget_without_a_bound_and_a_wrong_name_are_refused(parts: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        budget(**parts)


def test_a_budget_of_zero_for_each_teacher_is_zero() -> None:
    assert budget(teachers={"a": 0, "b": {"tokens": 0}}).is_zero
    assert not budget(teachers={"a": 0, "b": 0.1}).is_zero
    assert not budget(fraction=0.1, teachers={"a": 0, "b": None}).is_zero


def test_an_unknown_teacher_is_found() -> None:
    assert budget(fraction=0.1, teachers=["a", "c"]).unknown(["a", "b"]) == "c"
    assert budget(fraction=0.1).unknown([]) is None


@pytest.mark.parametrize(
    ("wanted", "maximum", "left", "problem"),
    [
        (
            {"fraction": 0.5},
            {"fraction": 0.3, "teachers": ["a"]},
            {"fraction": 0.3, "teachers": ["a"]},
            "0.5",
        ),
        ({"fraction": 0.1, "teachers": ["b"]}, {"fraction": 0.3}, {"fraction": 0.1, "teachers": ["b"]}, None),
        (
            {"fraction": 0.1, "teachers": ["a", "b"]},
            {"fraction": 0.3, "teachers": {"a": {"tokens": 5}}},
            {"fraction": 0.1, "teachers": {"a": {"tokens": 5}}},
            "the teacher b is not for this key",
        ),
        (
            {"fraction": 0.1, "teachers": {"a": {"tokens": 9, "calls": 2}}},
            {"fraction": 0.3, "teachers": {"a": {"tokens": 5}}},
            {"fraction": 0.1, "teachers": {"a": {"tokens": 5, "calls": 2}}},
            "a: tokens 9 is more than this key's maximum of 5",
        ),
        (
            {"fraction": 0.1, "teachers": ["b"]},
            {"fraction": 0.3, "teachers": ["a"]},
            {"tokens": 0},
            "for this key",
        ),
    ],
)
def test_a_maximum_lowers_what_is_above_it(
    wanted: dict[str, object], maximum: dict[str, object], left: dict[str, object], problem: str | None
) -> None:
    assert budget(**wanted).within(budget(**maximum)) == budget(**left)
    problems = budget(**maximum).exceeded_by(budget(**wanted))
    assert (problem is None) == (problems == [])
    assert problem is None or problem in problems[0]


def test_a_teacher_that_is_too_dear_gets_nothing_and_costs_nothing() -> None:
    """Reading 4 tokens and writing 1 costs 18 millionths at the dear teacher, 6 at the cheap one."""
    bucket = Bucket(Budget(cost=1e-5), 4, 1, prices=DEAR, least=CHEAP)
    assert bucket.earliest(4) == 0
    assert bucket.reserve(0, 9, reads=4, prices=DEAR) is None
    grant = bucket.reserve(0, 9, reads=4, prices=CHEAP)
    assert grant is not None
    assert grant.cost == 6 * 10**6
    bucket.settle(grant, 1, grant.cost)
    assert (bucket.spent, bucket.cost_left) == (1, 4 * 10**6)
    assert bucket.earliest(4) is None


@pytest.mark.parametrize(("length", "tokens"), [(0, 4), (8, 5), (20, 6)])
def test_a_whole_call_may_have_all_that_the_fraction_allows(length: int, tokens: int) -> None:
    """A call may have (0.1 · length + 4) / 0.9 tokens, so that the bound holds at its end."""
    bucket = Bucket(Budget(fraction=0.1), 4, 1)
    grant = bucket.reserve(length, 50, whole=True)
    assert grant is not None
    assert grant.tokens == tokens
    assert bucket.spent <= 0.1 * (length + tokens) + 4
    assert bucket.spent + 1 > 0.1 * (length + tokens + 1) + 4


def test_a_teachers_limit_is_an_account_of_its_own() -> None:
    of_all = Scope("global", "", TokensPerWindow(tokens=9, window_seconds=60))
    of_one = Scope("global", "", TokensPerWindow(tokens=9, window_seconds=60, teacher="a"))
    assert of_all.id == "global::tokens:60000"
    assert of_one.id != of_all.id
    assert (of_all.teacher, of_one.teacher) == (None, "a")
