import math
import random
from collections.abc import Iterator
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.budget import Bucket, Budget
from router.policy import NEVER, Calibration, GateOutput, Policy, Terms

POINTS = Calibration(((0.1, 4.0), (0.3, 2.0), (0.5, -1.0)))
# price = 11 - 10 * rate, so that a test can read the rate off the price
LINE = Calibration(((0.1, 10.0), (0.9, 2.0)))
POLICY = Policy(LINE, expected_tokens=20)


def rate_of(terms: Terms) -> float:
    return (11 - terms.price) / 10


# Calibration


@pytest.mark.parametrize(
    ("rate", "price"),
    [
        (0.1, 4.0),
        (0.15, 3.5),
        (0.2, 3.0),
        (0.3, 2.0),
        (0.4, 0.5),
        (0.5, -1.0),
        (0.01, 4.0),  # beyond the ends: the last price that was measured
        (0.99, -1.0),
        (0.0, math.inf),
        (-1.0, math.inf),
        (1.0, -math.inf),
        (7.0, -math.inf),
    ],
)
def test_a_price_is_linear_between_the_points(rate, price):
    assert POINTS.price(rate) == pytest.approx(price)


def test_a_single_point_is_a_fixed_price():
    fixed = Calibration(((0.5, 1.25),))
    assert [fixed.price(rate) for rate in (0.01, 0.5, 0.99)] == [1.25] * 3
    assert fixed.price(0) == math.inf


@given(low=st.floats(0, 1), high=st.floats(0, 1))
def test_a_higher_rate_never_has_a_higher_price(low, high):
    low, high = sorted((low, high))
    assert POINTS.price(low) >= POINTS.price(high)


@pytest.mark.parametrize(
    ("points", "about"),
    [
        ((), "rates"),
        (((0.3, 1.0), (0.1, 2.0)), "rates"),  # rates fall
        (((0.1, 2.0), (0.1, 1.0)), "rates"),  # a rate twice
        (((0.0, 2.0), (0.1, 1.0)), "rates"),
        (((0.1, 2.0), (1.0, 1.0)), "rates"),
        (((0.1, 1.0), (0.3, 2.0)), "prices"),  # prices rise
        (((0.1, math.inf), (0.3, 2.0)), "prices"),
        (((0.1, 1.0), (0.3, -math.inf)), "prices"),
        (((0.1, math.nan),), "prices"),
    ],
)
def test_impossible_points_are_refused(points, about):
    with pytest.raises(ValueError, match=f"calibration {about} must"):
        Calibration(points)


def test_equal_prices_are_possible():
    assert Calibration(((0.1, 1.0), (0.2, 1.0))).price(0.15) == 1.0


# The random gate


@pytest.mark.parametrize(
    ("span_tokens", "rate", "price"),
    [
        (1, 0.1, 0.9),  # spans of one token: the rate is the share of positions
        (1, 0.5, 0.5),
        (1, 0.01, 0.99),
        (1, 0.99, 0.01),
        (4, 0.5, 0.8),  # one of five positions asks: 4 teacher tokens for 4 of the student
        (4, 0.2, 1 - 1 / 17),  # one of 17: 4 teacher tokens for 16 of the student
    ],
)
def test_the_random_gates_price_can_be_computed(span_tokens, rate, price):
    assert Calibration.of_random_gate(span_tokens).price(rate) == pytest.approx(price)


@pytest.mark.parametrize("span_tokens", [1, 4, 8])
@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5, 0.8])
def test_asking_at_the_random_gates_price_realises_the_rate(span_tokens, rate):
    price = Calibration.of_random_gate(span_tokens).price(rate)
    draw = random.Random(0)
    student = teacher = 0
    for _ in range(40_000):
        if draw.random() > price:
            teacher += span_tokens
        else:
            student += 1
    assert teacher / (teacher + student) == pytest.approx(rate, rel=0.06)


# Terms


def test_without_a_budget_left_the_student_never_asks():
    bucket = Bucket(Budget(calls=1), span_tokens=4)
    bucket.reserve(0, at_most=4)
    assert POLICY.terms(bucket, 4, max_tokens=100) == NEVER
    assert NEVER.never
    assert not NEVER.always


def test_a_fraction_is_the_rate():
    terms = POLICY.terms(Bucket(Budget(fraction=0.25), span_tokens=4), 0, max_tokens=100)
    assert rate_of(terms) == pytest.approx(0.25)
    assert terms.not_before == 0


def test_a_bucket_with_less_than_a_call_makes_the_next_one_dearer():
    """The rate is f exp(-a (1 - calls in the bucket)) with a = 10 f / ask_tokens."""
    bucket = Bucket(Budget(fraction=0.25), span_tokens=4)
    bucket.reserve(0, at_most=4)  # at a length of 4 the bucket has 1 token of 4, at 16 it has 4
    assert rate_of(POLICY.terms(bucket, 4, max_tokens=100)) == pytest.approx(0.25 * math.exp(-0.625 * 0.75))
    assert rate_of(POLICY.terms(bucket, 10, max_tokens=100)) == pytest.approx(0.25 * math.exp(-0.625 * 0.375))
    assert rate_of(POLICY.terms(bucket, 16, max_tokens=100)) == pytest.approx(0.25)
    assert rate_of(POLICY.terms(bucket, 60, max_tokens=100)) == pytest.approx(0.25)


def test_a_bucket_with_many_calls_left_has_the_plain_price():
    bucket = Bucket(Budget(fraction=0.25), span_tokens=4, ask_tokens=1)
    for _ in range(3):
        bucket.reserve(0, at_most=1)
    assert rate_of(POLICY.terms(bucket, 3, max_tokens=100)) == pytest.approx(0.25)
    bucket.reserve(3, at_most=1)  # 0.75 calls of one token are left
    assert rate_of(POLICY.terms(bucket, 3, max_tokens=100)) == pytest.approx(0.25 * math.exp(-0.25))


def test_a_whole_fraction_lets_the_teacher_write_at_once():
    assert POLICY.terms(Bucket(Budget(fraction=1), span_tokens=4), 0, max_tokens=100).always


def test_a_spent_fraction_sets_when_to_ask_again():
    bucket = Bucket(Budget(fraction=0.1), span_tokens=4)
    bucket.reserve(0, at_most=4)  # the next span may start at a length of 36
    assert [POLICY.terms(bucket, length, max_tokens=100).not_before for length in (4, 30, 36, 50)] == [
        32,
        6,
        0,
        0,
    ]


@pytest.mark.parametrize(("max_tokens", "never"), [(36, True), (37, False)])
def test_a_span_that_could_only_start_after_the_end_is_never_asked_for(max_tokens, never):
    bucket = Bucket(Budget(fraction=0.1), span_tokens=4)
    bucket.reserve(0, at_most=4)  # the next span may start at a length of 36
    assert POLICY.terms(bucket, 4, max_tokens).never is never


def test_a_tiny_fraction_is_spent_once_and_then_never_asked_for():
    bucket = Bucket(Budget(fraction=5e-324), span_tokens=4)
    assert not POLICY.terms(bucket, 0, max_tokens=100).never
    bucket.settle(bucket.reserve(0, at_most=4), used=1)
    assert POLICY.terms(bucket, 1, max_tokens=100) == NEVER


@pytest.mark.parametrize(
    ("tokens", "written", "rate"),
    [
        (5, 0, 0.25),  # 5 left for the 20 that are expected
        (5, 10, 0.5),  # 5 left for 10
        (2, 18, 0.5),  # near the expected end: at least one span is still to come
        (2, 400, 0.5),  # and after it
    ],
)
def test_tokens_are_planned_over_what_is_still_to_be_written(tokens, written, rate):
    bucket = Bucket(Budget(tokens=tokens), span_tokens=4)
    assert rate_of(POLICY.terms(bucket, written, max_tokens=1000)) == pytest.approx(rate)


def test_tokens_that_were_spent_raise_the_price():
    bucket = Bucket(Budget(tokens=10), span_tokens=4)
    before = POLICY.terms(bucket, 0, max_tokens=100)
    bucket.settle(bucket.reserve(0, at_most=100), used=4)
    after = POLICY.terms(bucket, 4, max_tokens=100)
    assert rate_of(before) == pytest.approx(10 / 20)
    assert rate_of(after) == pytest.approx(6 / 16)


def test_max_tokens_shortens_the_plan():
    bucket = Bucket(Budget(tokens=5), span_tokens=4)
    assert rate_of(POLICY.terms(bucket, 0, max_tokens=10)) == pytest.approx(0.5)


def test_calls_are_planned_as_whole_spans():
    bucket = Bucket(Budget(calls=2), span_tokens=4)
    assert rate_of(POLICY.terms(bucket, 0, max_tokens=100)) == pytest.approx(2 * 4 / 20)


def test_calls_for_less_than_a_span_are_planned_with_their_own_length():
    bucket = Bucket(Budget(calls=2), span_tokens=4, ask_tokens=1)
    assert rate_of(POLICY.terms(bucket, 0, max_tokens=100)) == pytest.approx(2 * 1 / 20)
    assert rate_of(POLICY.terms(bucket, 17, max_tokens=100)) == pytest.approx(2 * 1 / 3)


def test_tokens_for_everything_let_the_teacher_write_at_once():
    assert POLICY.terms(Bucket(Budget(tokens=20), span_tokens=4), 0, max_tokens=100).always


def test_the_tightest_part_sets_the_price():
    def rate(**parts: float) -> float:
        return rate_of(POLICY.terms(Bucket(Budget(**parts), span_tokens=4), 0, max_tokens=100))

    assert rate(fraction=0.5, tokens=4, calls=2) == pytest.approx(4 / 20)
    assert rate(fraction=0.15, tokens=4, calls=2) == pytest.approx(0.15)
    assert rate(fraction=0.5, tokens=16, calls=1) == pytest.approx(4 / 20)


# Spare prices: a fraction is a rate to hit


def test_a_spare_price_holds_while_a_call_fits_into_the_fraction():
    policy = Policy(LINE, expected_tokens=20, spare=Calibration(((0.1, 1.0), (0.9, 0.0))))
    bucket = Bucket(Budget(fraction=0.25), span_tokens=4, ask_tokens=1)
    terms = policy.terms(bucket, 0, max_tokens=100)
    assert (terms.price, terms.not_before) == (LINE.price(0.25), 0)
    assert (terms.spare_price, terms.spare_from) == (policy.spare.price(0.25), 3)
    bucket.reserve(3, at_most=10)
    assert policy.terms(bucket, 5, max_tokens=100).spare_from == 2


def test_a_spare_price_follows_the_ceiling_and_is_never_above_the_price():
    policy = Policy(LINE, expected_tokens=20, spare=Calibration(((0.1, 20.0), (0.9, 0.0))))
    bucket = Bucket(Budget(fraction=0.8), span_tokens=4, ask_tokens=1)
    terms = policy.terms(bucket, 0, max_tokens=100, ceiling=0.1)
    assert terms.spare_price == terms.price == LINE.price(0.1)


def test_tokens_and_whole_fractions_have_no_spare_price():
    policy = Policy(LINE, expected_tokens=20, spare=LINE)
    for budget in (Budget(tokens=5), Budget(fraction=1), Budget(calls=2)):
        assert policy.terms(Bucket(budget, span_tokens=4), 0, max_tokens=100).spare_price is None


EXTREMES = (5e-324, 1e-308, 1e-300, 1e-12, 0.5, 1 - 2**-53, None)


def allowed_budgets() -> Iterator[Budget]:
    for fraction, tokens, calls in product(EXTREMES, (1, 2**63 - 1, None), (1, 2**63 - 1, None)):
        if (fraction, tokens, calls) != (None, None, None):
            yield Budget.model_validate({"fraction": fraction, "tokens": tokens, "calls": calls})


@pytest.mark.parametrize("max_tokens", [1, 10**9])
def test_every_budget_that_is_allowed_has_terms(max_tokens):
    policy = Policy(LINE, expected_tokens=20, spare=LINE)
    for budget, spans in product(allowed_budgets(), ((1, 1), (8, 1), (8, 8))):
        bucket = Bucket(budget, *spans)
        for completion_tokens in (0, 1, 10**8):
            terms = policy.terms(bucket, completion_tokens, max_tokens)
            assert not math.isnan(terms.price), (budget, spans)
            grant = bucket.reserve(completion_tokens, at_most=8)
            assert grant is None or grant.tokens >= 1, (budget, spans)


# Several teachers

RATES = Calibration(((0.1, 6.0), (0.2, 5.0), (0.3, 4.0), (0.4, 3.0), (0.6, 1.0)))


def prices(fraction: float, *caps: float) -> list[float]:
    """The price of the cheapest teacher, and the prices of the dearer ones."""
    terms = Policy(RATES, 100.0).terms(Bucket(Budget(fraction=fraction), 4), 40, 400, caps=caps)
    return [terms.price, *terms.dearer]


def test_each_of_several_teachers_has_an_equal_share_of_the_rate():
    assert prices(0.4, 1.0, 1.0) == [3.0, 5.0]  # the prices of .4 and .2
    assert prices(0.3, 1.0, 1.0, 1.0) == pytest.approx([4.0, 5.0, 6.0])  # the prices of .3, .2 and .1


def test_cheaper_teachers_get_the_tokens_that_a_cap_takes_from_a_dearer_one():
    assert prices(0.4, 1.0, 0.1) == [3.0, 6.0]
    assert prices(0.6, 1.0, 1.0, 0.1) == pytest.approx([1.0, 3.0, 6.0])  # the prices of .6, .4 and .1


def test_the_rate_is_at_most_the_sum_of_all_caps():
    assert prices(0.6, 0.2, 0.1) == pytest.approx([4.0, 6.0])


def test_a_teacher_whose_price_is_not_above_the_first_is_not_asked():
    """Below the calibrated range the prices are equal, so the cheapest teacher is asked."""
    assert prices(0.1, 1.0, 1.0) == [6.0, math.inf]
    assert prices(0.15, 1.0, 1.0, 1.0) == pytest.approx([5.5, 6.0, 6.0])


def test_if_more_teacher_tokens_do_not_help_the_realised_rate_is_shared():
    """The price of .3 is that of .1, which is realised. Half of .1 is the dear one's: the price of .05."""
    flat = Calibration(((0.05, 5.0), (0.1, 3.0), (0.3, 3.0), (0.5, 1.0)))
    terms = Policy(flat, 100.0).terms(Bucket(Budget(fraction=0.3), 4), 40, 400, caps=(1.0, 1.0))
    assert (terms.price, terms.dearer) == (3.0, (5.0,))


# A gate with an output for each of several teachers

SMALL = GateOutput("small", 0.25, Calibration(((0.1, 1.5), (0.3, 0.5))))
BIG = GateOutput("big", 1.0)


def by_outputs(fraction: float, **caps: float) -> Terms:
    """Terms for a gate with outputs for two teachers; `RATES` has the common prices."""
    policy = Policy(RATES, 100.0, outputs=(SMALL, BIG))
    bucket = Bucket(Budget(fraction=fraction), 4)
    return policy.terms(bucket, 40, 400, caps=list(caps.values()), names=list(caps))


def test_without_caps_all_outputs_have_a_common_price_and_no_bound():
    terms = by_outputs(0.3, small=1.0, big=1.0)
    assert (terms.price, terms.dearer) == (4.0, ())
    assert terms.least == (("small", -math.inf), ("big", -math.inf))


def test_a_teacher_that_is_not_there_is_never_asked():
    """The big teacher costs 1, so its own price is the common price."""
    terms = by_outputs(0.3, big=1.0)
    assert terms.least == (("small", math.inf), ("big", -math.inf))
    assert terms.price == 4.0


def test_a_teacher_that_is_alone_has_the_price_that_was_measured_for_it():
    """The teacher's price for .3 is .5, which is a common price of 2."""
    terms = by_outputs(0.3, small=1.0)
    assert terms.least == (("small", -math.inf), ("big", math.inf))
    assert terms.price == 2.0


def test_a_cap_is_a_least_price():
    """Small's own price for .1 is 1.5. Big's is the common price of .2, at which both together realise .2."""
    terms = by_outputs(0.4, small=0.1, big=1.0)
    assert terms.least == (("small", 1.5), ("big", -math.inf))
    terms = by_outputs(0.4, small=1.0, big=0.2)
    assert terms.least == (("small", -math.inf), ("big", 5.0))
    assert terms.price == 3.0


def test_without_a_model_the_score_alone_decides():
    """The gate has no output for a tool."""
    terms = by_outputs(0.3, calculator=1.0)
    assert (terms.price, terms.least) == (4.0, ())


def test_budgets_of_0_and_1_do_not_depend_on_the_outputs():
    assert by_outputs(0.0, small=1.0, big=1.0).never
    assert by_outputs(1.0, small=1.0, big=1.0).always
    assert by_outputs(1.0, small=1.0).always
