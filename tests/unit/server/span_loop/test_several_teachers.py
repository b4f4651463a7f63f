"""The span loop over several teachers: who is asked, who takes over, and the budget of each.

The student writes small letters, the cheap teacher capitals, and the dear one digits, each by its place.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.adaptive import AdaptiveCalibration
from router.budget import Budget
from router.controller import PriceController
from router.ledger import MemoryLedger, TokensPerWindow
from router.money import PriceList
from router.policy import Calibration, GateOutput, Policy
from server.cooperation import Cooperation
from server.gate_processor import DEARER, LEAST
from server.shared_budgets import SharedBudgets
from server.teacher.teachers import NamedTeacher, Teachers
from server.vllm_api import GracefulHTTPError, VLLMValidationError
from tests.helpers.scripted_pair import Engine, ScriptedTeacher, count, spent, start, write
from tests.helpers.scripted_student import RESERVED, ScriptedLLM

CALIBRATION = Calibration(((0.1, 3.0), (0.2, 2.0), (0.5, 1.0)))
PRICES = PriceList.model_validate(
    {
        "student": {"input": 0, "output": 0},
        "teacher": {"small": {"input": 1, "output": 2}, "big": {"input": 2, "output": 10}},
    }
)
MILLIONTH = 1e-6


class Trio:
    """A student and two teachers."""

    def __init__(self, tokenizer: Any, ask_at: dict[int, int], **options: Any) -> None:
        self.small = ScriptedTeacher(**options.pop("small", {}))
        self.big = ScriptedTeacher(first="0", **options.pop("big", {}))
        prices = options.pop("prices", None)
        names = options.pop("names", ("small", "big"))
        each = [
            NamedTeacher(name, pool, None if prices is None else prices.of_teacher(name))
            for name, pool in zip(names, (self.small, self.big), strict=True)
        ]
        span_tokens = options.pop("span_tokens", 2)
        self.shared = SharedBudgets(
            MemoryLedger(), PriceController(CALIBRATION, span_tokens), options.pop("limits", ())
        )
        cooperation = Cooperation(
            teachers=Teachers(each, priced=prices is not None),
            policy=Policy(CALIBRATION, expected_tokens=20, outputs=options.pop("outputs", ())),
            reserved=RESERVED,
            span_tokens=span_tokens,
            default_budget=Budget(fraction=0.5),
            shared=self.shared,
            prices=prices,
            **options,
        )
        self.engine = Engine(ScriptedLLM(tokenizer, ask_at, None), cooperation)

    async def text(self, budget: Any = 0.5, **params: Any) -> str:
        return (await write(self.engine, budget, **params)).text()

    @property
    def report(self) -> dict[str, Any]:
        (report,) = self.engine.exchange.reports
        return report.as_dict()


@pytest.fixture
def trio(tokenizer: Any) -> Callable[..., Trio]:
    """A function that builds three models: ``trio({2: 0, 5: 1})`` asks at 2, and the dear teacher at 5."""
    return lambda ask_at, **options: Trio(tokenizer, ask_at, **options)


async def test_the_cheap_teacher_is_asked_first_and_the_dear_one_by_the_score(trio):
    three = trio({2: 0, 5: 1})
    assert await three.text() == "abCDe56h"
    assert three.report["teachers"] == {
        "small": {"tokens": 2, "calls": 1, "spans": [[2, 4]]},
        "big": {"tokens": 2, "calls": 1, "spans": [[5, 7]]},
    }
    assert (three.report["tokens"], three.report["calls"]) == (4, 2)
    assert three.report["spans"] == [[2, 4], [5, 7]]


async def test_a_report_has_the_names_whichever_teacher_was_called(tokenizer):
    """This holds even if one of several is called as the only one would be."""
    three = Trio(tokenizer, {2: 0}, names=("teacher", "big"))
    await three.text()
    assert three.report["teachers"].keys() == {"teacher"}


async def test_every_step_names_who_wrote_it(trio):
    three = trio({1: 0, 3: 1})
    outputs, exchange = start(three.engine, 0.9, max_tokens=6)
    sources = []
    async for _ in outputs:
        sources.append(exchange.latest.source)
    assert sources == ["student", "small", "small", "big", "big", "student"]


async def test_prices_decide_which_teacher_is_cheap(trio):
    prices = {"student": {"input": 0, "output": 0}, "teacher": {}}
    prices["teacher"] = {"small": {"input": 1, "output": 20}, "big": {"input": 2, "output": 10}}
    three = trio({2: 0, 5: 1}, prices=PriceList.model_validate(prices))
    assert await three.text() == "ab23eFGh"


@pytest.mark.parametrize(("down", "text"), [("small", "ab23e56h"), ("big", "abCDeFGh")])
async def test_if_one_teacher_is_down_the_other_takes_over(trio, down, text):
    three = trio({2: 0, 5: 1})
    getattr(three, down).breaker.failed()
    assert await three.text() == text
    assert (three.report["degraded"], three.report["denied"]) == (False, {})


async def test_if_all_teachers_are_down_the_student_goes_on(trio):
    three = trio({2: 0, 5: 1})
    three.small.breaker.failed()
    three.big.breaker.failed()
    assert await three.text() == "abcdefgh"
    assert (three.report["degraded"], three.report["denied"]) == (True, {"breaker": 1})
    assert "teachers" not in three.report


async def test_a_call_that_fails_before_its_first_token_goes_to_the_other_teacher(trio):
    three = trio({2: 0, 6: 0}, small={"fails_at": 2})
    assert await three.text(max_tokens=10) == "ab23ef67ij"
    assert (three.report["degraded"], three.report["denied"]) == (False, {})
    assert len(three.small.calls) == 1  # it is left alone for a while
    assert spent(three.engine) == (4, 3)


async def test_after_a_token_the_student_goes_on_and_the_loss_is_reported(trio):
    three = trio({2: 0}, small={"fails_at": 3})
    assert await three.text() == "abCdefgh"
    assert (three.report["degraded"], three.report["denied"]) == (True, {"timeout": 1})
    assert three.big.calls == []


async def test_if_a_teacher_is_busy_another_one_is_asked(trio):
    three = trio({2: 1}, big={"refuses": "saturated"})
    assert await three.text() == "abCDefgh"
    assert (three.report["degraded"], three.report["denied"]) == (False, {})


async def test_the_gateway_fails_only_if_nobody_takes_over(trio):
    three = trio({2: 0}, small={"refuses": "unreachable"}, on_teacher_error="error")
    assert await three.text() == "ab23efgh"
    both = trio(
        {2: 0}, small={"refuses": "unreachable"}, big={"refuses": "timeout"}, on_teacher_error="error"
    )
    with pytest.raises(GracefulHTTPError, match="could not be reached"):
        await both.text()


async def test_a_full_context_of_one_teacher_does_not_stop_the_other(trio):
    three = trio({2: 0}, small={"max_model_len": 4})
    assert await three.text() == "ab23efgh"
    assert three.report["denied"] == {}


# What a request allows


async def test_a_budget_of_one_is_one_call_of_the_dearest_teacher(trio):
    three = trio({})
    assert await three.text(1) == "01234567"
    assert (len(three.big.calls), three.small.calls) == (1, [])


async def test_a_request_may_name_its_teachers(trio):
    three = trio({2: 0, 5: 1})
    assert await three.text({"fraction": 0.5, "teachers": ["big"]}) == "ab23e56h"
    assert await three.text({"fraction": 0.5, "teachers": ["small"]}) == "abCDeFGh"
    assert await three.text({"fraction": 1, "teachers": ["small"]}) == "ABCDEFGH"


async def test_an_unknown_name_of_a_teacher_is_refused(trio):
    three = trio({})
    with pytest.raises(VLLMValidationError, match="no teacher is named 'huge'; there are: small, big") as e:
        start(three.engine, {"fraction": 0.5, "teachers": ["small", "huge"]})
    assert e.value.parameter == "teacher_budget"


async def test_a_teacher_may_have_a_budget_of_its_own(trio):
    """The dear teacher writes two tokens. Then the cheap one writes in its place."""
    three = trio(dict.fromkeys(range(2, 20), 1))
    text = await three.text(
        {"fraction": 0.9, "teachers": {"small": None, "big": {"tokens": 2}}}, max_tokens=12
    )
    assert text == "ab23EFGHIJKL"
    assert three.report["teachers"]["big"]["tokens"] == 2


async def test_budgets_of_single_teachers_are_enough(trio):
    three = trio(dict.fromkeys(range(2, 20), 0))
    text = await three.text({"teachers": {"small": {"tokens": 2}, "big": {"tokens": 2}}}, max_tokens=10)
    assert text == "abCD45ghij"
    assert three.report["denied"] == {}


async def test_a_teacher_may_have_a_budget_of_zero(trio):
    three = trio({2: 1, 5: 1})
    assert await three.text({"fraction": 0.5, "teachers": {"small": None, "big": 0}}) == "abCDeFGh"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    asks=st.dictionaries(st.integers(0, 59), st.integers(0, 1)),
    small=st.floats(0.01, 1),
    big=st.floats(0.01, 1),
    spans=st.sampled_from([1, 2, 4]),
    fails_at=st.none() | st.integers(0, 59),
)
async def test_every_fraction_is_a_bound_at_every_moment(trio, asks, small, big, spans, fails_at):
    three = trio(asks, span_tokens=spans, big={"fails_at": fails_at})
    budget = {"fraction": 0.4, "teachers": {"small": small, "big": big}}
    await three.text(budget, max_tokens=60)
    for bound, spent_in in ((0.4, three.report["spans"]), *_own(three, small, big)):
        written = 0
        for begin, end in spent_in:
            written += end - begin
            assert written <= bound * end + spans + 1e-9


def _own(three: Trio, small: float, big: float) -> list[tuple[float, list[list[int]]]]:
    parts = three.report.get("teachers", {})
    return [
        (bound, parts[name]["spans"]) for name, bound in (("small", small), ("big", big)) if name in parts
    ]


# Money


async def test_a_teacher_that_is_too_dear_is_not_asked(trio):
    """To read 4 tokens and write 2 costs 28 millionths at the dear teacher, and 8 at the cheap one."""
    three = trio({2: 1}, prices=PRICES)
    assert await three.text({"fraction": 0.5, "cost": 11 * MILLIONTH}) == "abCDefgh"
    assert three.report["cost"] == pytest.approx(8 * MILLIONTH)
    assert three.report["teachers"]["small"]["cost"] == pytest.approx(8 * MILLIONTH)


async def test_each_teacher_is_paid_by_its_own_prices(trio):
    """Small reads 4 and writes 2 for 8. Big reads 7 and writes 2 for 34. Big alone reads 2 and writes 8."""

    def counted() -> list[float]:
        return [count("wheels_cost_total", model=model) for model in ("small", "big")]

    before = counted()
    three = trio({2: 0, 5: 1}, prices=PRICES)
    await three.text()
    costs = {name: part["cost"] for name, part in three.report["teachers"].items()}
    assert costs == pytest.approx({"small": 8 * MILLIONTH, "big": 34 * MILLIONTH})
    assert three.report["cost"] == pytest.approx(42 * MILLIONTH)
    assert three.report["saved"] == pytest.approx((2 * 2 + 8 * 10 - 42) * MILLIONTH)
    new = [after - earlier for earlier, after in zip(before, counted(), strict=True)]
    assert new == pytest.approx([8 * MILLIONTH, 34 * MILLIONTH])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    cost=st.integers(1, 900),
    own=st.integers(1, 900),
    asks=st.dictionaries(st.integers(0, 59), st.integers(0, 1)),
    spans=st.sampled_from([1, 2, 4]),
    fails_at=st.none() | st.integers(0, 59),
)
async def test_no_cost_is_ever_exceeded(trio, cost, own, asks, spans, fails_at):
    three = trio(asks, span_tokens=spans, prices=PRICES, small={"fails_at": fails_at})
    budget = {"cost": cost * MILLIONTH, "teachers": {"small": None, "big": {"cost": own * MILLIONTH}}}
    await three.text(budget, max_tokens=60)
    (report,) = three.engine.exchange.reports
    assert report.costs.teacher.total <= cost * 10**6
    assert "big" not in report.costs.teachers or report.costs.teachers["big"].total <= own * 10**6


# What requests share


async def test_a_limit_may_count_one_teacher_only(trio):
    """The dear teacher has two tokens in all. Tokens of the cheap one do not count there."""
    limits = [TokensPerWindow(tokens=2, window_seconds=60, teacher="big")]
    three = trio({1: 0, 4: 1, 8: 1}, limits=limits)
    assert await three.text(0.9, max_tokens=12) == "aBCd45ghIJkl"
    await three.shared.aclose()
    (status,) = await three.shared.ledger.status(three.shared.everybody)
    assert (status.spent, status.reserved, status.student_tokens) == (2, 0, 6)
    assert three.report["denied"] == {}


async def test_a_limit_of_all_and_one_of_a_teacher_hold_together(trio):
    limits = [
        TokensPerWindow(tokens=5, window_seconds=60),
        TokensPerWindow(tokens=2, window_seconds=60, teacher="big"),
    ]
    three = trio(dict.fromkeys(range(1, 40), 1), limits=limits)
    await three.text(0.9, max_tokens=30)
    await three.shared.aclose()
    everybody, big = await three.shared.ledger.status(three.shared.everybody)
    assert (everybody.spent, big.spent) == (5, 2)
    assert three.report["denied"] == {"global_tokens": 1}


@pytest.mark.parametrize("budget", [{"fraction": 0.2, "teachers": {"small": None, "big": 0.1}}, 0.2])
async def test_a_price_is_learned_from_budgets_of_all_only(trio, budget):
    class Watched(AdaptiveCalibration):
        seen = 0

        def observe(self, *_: Any, **__: Any) -> None:
            self.seen += 1

    three = trio({2: 0})
    watched = three.engine.cooperator._loop.policy = Policy(Watched("margin", 2), expected_tokens=20)
    await three.text(budget)
    assert (watched.calibration.seen > 0) == (budget == 0.2)


# Terms


async def test_terms_have_a_price_for_the_dear_teacher(trio):
    """Half of the rate is the dear teacher's. The price of .2 is 2, and the price of .1 is 3."""
    three = trio({})
    await three.text({"fraction": 0.2})
    (segment,) = three.engine.segments
    assert (segment.price, segment.params.extra_args[DEARER]) == (2.0, [3.0])
    asks = {RESERVED.escalation, RESERVED.escalation + 1}
    assert asks <= set(segment.params.stop_token_ids)


async def test_a_small_budget_of_the_dear_teacher_makes_it_dearer(trio):
    """The dear teacher may have .1 of the .5. The rest is the cheap one's."""
    three = trio({})
    await three.text({"fraction": 0.5, "teachers": {"small": None, "big": 0.1}})
    assert three.engine.segments[0].params.extra_args[DEARER] == [3.0]


async def test_with_min_tokens_there_is_one_price(trio):
    """vLLM would mask the rows of the other teachers, which the gate reads."""
    three = trio({2: 0})
    assert await three.text({"fraction": 0.5}, min_tokens=4) == "abCDefgh"
    for segment in three.engine.segments:
        assert DEARER not in segment.params.extra_args
        assert RESERVED.escalation + 1 not in segment.params.stop_token_ids


async def test_a_teacher_that_is_down_has_no_price(trio):
    three = trio({})
    three.big.breaker.failed()
    await three.text({"fraction": 0.2})
    assert DEARER not in three.engine.segments[0].params.extra_args


# A gate with an output for each

OUTPUTS = (GateOutput("small", 0.25), GateOutput("big", 1.0))


async def test_an_output_stands_for_its_teacher(trio):
    three = trio({2: 0, 5: 1}, outputs=OUTPUTS)
    assert await three.text() == "abCDe56h"
    extra = three.engine.segments[0].params.extra_args
    assert (three.engine.segments[0].price, extra[LEAST]) == (1.0, [-math.inf, -math.inf])
    assert DEARER not in extra


async def test_an_output_stands_for_its_teacher_in_any_order(trio):
    """The router has its own order of teachers. Here the big one has the lower price."""
    prices = {"student": {"input": 0, "output": 0}, "teacher": {}}
    prices["teacher"] = {"small": {"input": 1, "output": 20}, "big": {"input": 2, "output": 10}}
    three = trio({2: 0, 5: 1}, outputs=OUTPUTS, prices=PriceList.model_validate(prices))
    assert await three.text() == "abCDe56h"


async def test_a_teacher_that_a_request_does_not_name_is_kept_from_the_gate(trio):
    three = trio({2: 1, 5: 0}, outputs=OUTPUTS)
    assert await three.text({"fraction": 0.5, "teachers": ["big"]}) == "ab23e56h"
    assert three.engine.segments[0].params.extra_args[LEAST] == [math.inf, -math.inf]


async def test_a_teacher_that_is_down_is_kept_from_the_gate(trio):
    three = trio({2: 0}, outputs=OUTPUTS)
    three.big.breaker.failed()
    assert await three.text() == "abCDefgh"
    assert three.engine.segments[0].params.extra_args[LEAST] == [-math.inf, math.inf]


async def test_a_budget_of_the_dear_teacher_is_a_least_price(trio):
    """The price of .1 is 3. When its two tokens are spent, the gate no longer asks it."""
    three = trio({2: 1, 6: 0}, outputs=OUTPUTS)
    budget = {"fraction": 0.5, "teachers": {"small": None, "big": {"fraction": 0.1, "tokens": 2}}}
    assert await three.text(budget, max_tokens=10) == "ab23efGHij"
    first, *_, last = [segment.params.extra_args[LEAST] for segment in three.engine.segments]
    assert first == [-math.inf, 3.0]
    assert last == [-math.inf, math.inf]


async def test_with_min_tokens_all_outputs_share_one_row(trio):
    three = trio({2: 0}, outputs=OUTPUTS)
    assert await three.text({"fraction": 0.5}, min_tokens=4) == "abCDefgh"
    for segment in three.engine.segments:
        assert LEAST not in segment.params.extra_args


async def test_a_common_price_is_learned_from_requests_that_may_ask_all_teachers(trio):
    class Watched(AdaptiveCalibration):
        seen = 0

        def observe(self, *_: Any, **__: Any) -> None:
            self.seen += 1

    three = trio({2: 0})
    watched = Watched("margin", 2)
    three.engine.cooperator._loop.policy = Policy(watched, expected_tokens=20, outputs=OUTPUTS)
    await three.text({"fraction": 0.2, "teachers": ["small"]})
    assert watched.seen == 0
    await three.text(0.2)
    assert watched.seen > 0


async def test_at_a_budget_of_one_the_dearest_teacher_writes_alone(trio):
    three = trio({}, outputs=OUTPUTS)
    assert await three.text(1) == "01234567"
