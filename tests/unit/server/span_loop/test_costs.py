"""The span loop: the costs of completions, and budgets in money."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.budget import Budget
from router.money import PriceList
from server.exchange import Exchange
from server.vllm_api import SamplingParams, VLLMValidationError
from tests.helpers.scripted_pair import count, start, write

PRICES = PriceList.model_validate(
    {
        "student": {"input": 0.1, "cached_input": 0.01, "output": 0.4},
        "teacher": {"input": 2, "cached_input": 0.5, "output": 10},
    }
)
MILLIONTH = 1e-6


def cost_of(teacher: Any, cached: float = 0.0) -> float:
    """The cost of a scripted teacher's calls, by hand, if it wrote all tokens of each call."""
    cost = 0.0
    for call in teacher.calls:
        hits = int(cached * len(call.prefix))
        cost += 2 * (len(call.prefix) - hits) + 0.5 * hits + 10 * call.tokens
    return cost * MILLIONTH


async def test_the_report_has_what_the_teacher_cost_and_what_was_saved(pair):
    """The prompt has 2 tokens, the only call's prefix 4. A scripted student finds half in its cache.

    Teacher: 4 · 2 + 2 · 10 = 28. Student: segments of 2 and 6 read tokens, half of each cached, 6 written:
    4 · 0.1 + 4 · 0.01 + 6 · 0.4 = 2.84. The teacher alone: 1 · 2 + 1 · 0.5 + 8 · 10 = 82.5.
    """
    engine, _ = pair(ask_at={2}, prices=PRICES)
    report = (await write(engine, 0.5)).report.as_dict()
    assert report["cost"] == pytest.approx(28 * MILLIONTH)
    assert report["saved"] == pytest.approx((82.5 - 28 - 2.84) * MILLIONTH)


async def test_without_prices_no_money_is_shown(pair):
    engine, _ = pair(ask_at={2})
    assert not {"cost", "saved"} & (await write(engine, 0.5)).report.as_dict().keys()


async def test_a_plain_request_costs_no_teacher_and_saves(pair):
    """2 tokens are read, one of them cached, and 8 written: 0.1 + 0.01 + 3.2, compared with 82.5."""
    engine, _ = pair(prices=PRICES)
    report = (await write(engine, 0)).report.as_dict()
    assert report["cost"] == 0
    assert report["saved"] == pytest.approx((82.5 - 3.31) * MILLIONTH)


async def test_the_teacher_alone_saves_nothing(pair):
    engine, _ = pair(prices=PRICES, caches=0.5)
    report = (await write(engine, 1)).report.as_dict()
    assert report["cost"] == pytest.approx(82.5 * MILLIONTH)
    assert report["saved"] == 0


async def test_choices_add_up(pair):
    engine, teacher = pair(ask_at={2}, prices=PRICES, caches=0.5)
    result = await write(engine, 0.5, n=2)
    each = [report.as_dict() for report in result.exchange.reports]
    total = result.exchange.total().as_dict()
    assert total["cost"] == pytest.approx(sum(report["cost"] for report in each))
    assert total["cost"] == pytest.approx(cost_of(teacher, 0.5))
    assert total["saved"] == pytest.approx(sum(report["saved"] for report in each))


async def test_costs_are_metrics(pair):
    kinds = [
        (model, kind) for model in ("student", "teacher") for kind in ("input", "cached_input", "output")
    ]

    def counts() -> list[float]:
        return [count("wheels_cost_total", model=model, kind=kind) for model, kind in kinds]

    before, alone = counts(), count("wheels_teacher_alone_cost_total")
    engine, _ = pair(ask_at={2}, prices=PRICES)
    await write(engine, 0.5)
    new = [round((after - earlier) / MILLIONTH, 6) for earlier, after in zip(before, counts(), strict=True)]
    assert new == [0.4, 0.04, 2.4, 8, 0, 20]
    assert count("wheels_teacher_alone_cost_total") - alone == pytest.approx(82.5 * MILLIONTH)


async def test_a_cost_is_a_budget(pair):
    """A call reads 2 to 20 tokens and writes 2, so 60 millionths buy two or three calls."""
    engine, teacher = pair(ask_at=range(100), prices=PRICES)
    report = (await write(engine, {"cost": 60 * MILLIONTH, "fraction": 0.9}, max_tokens=30)).report.as_dict()
    assert 0 < report["cost"] <= 60 * MILLIONTH
    assert report["cost"] == pytest.approx(cost_of(teacher))
    assert report["denied"] == {}


async def test_money_for_the_whole_completion_is_one_call(pair):
    """Reading 2 tokens and writing 8 costs 84."""
    engine, teacher = pair(ask_at=range(100), prices=PRICES)
    assert (await write(engine, {"cost": 84 * MILLIONTH})).text() == "ABCDEFGH"
    assert len(teacher.calls) == 1
    engine, teacher = pair(ask_at=range(100), prices=PRICES)
    assert (await write(engine, {"cost": 83.9 * MILLIONTH})).report.tokens < 8


async def test_a_call_that_breaks_off_counts_in_full(pair):
    """The call read 2 tokens and wrote one, as the report says. The budget is charged for three more."""
    engine, _ = pair(ask_at={0}, span_tokens=4, fails_at=1, prices=PRICES)
    report = (await write(engine, {"cost": 50 * MILLIONTH, "calls": 5})).report.as_dict()
    assert report["cost"] == pytest.approx(14 * MILLIONTH)
    ((purse,),) = engine.exchange.purses.values()
    assert purse.bucket.cost_left == pytest.approx((50 - 44) * 10**6)


@pytest.mark.parametrize("name", ["teacher_budget", "X-Teacher-Budget"])
async def test_a_cost_without_prices_is_refused(pair, name):
    engine, _ = pair()
    for cost in (0, 0.5):
        with pytest.raises(
            VLLMValidationError, match=f"{name}.cost: this gateway has no prices.*--prices"
        ) as e:
            start(engine, {"cost": cost}, budget_name=name)
        assert e.value.parameter == name


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    cost=st.integers(1, 900),
    cached=st.floats(0, 1),
    asks=st.sets(st.integers(0, 59)),
    spans=st.sampled_from([(1, 1), (4, 1), (4, 4), (16, 8)]),
    fails_at=st.none() | st.integers(0, 59),
)
async def test_the_cost_of_a_completion_is_never_exceeded(pair, cost, cached, asks, spans, fails_at):
    span, ask = spans
    engine, _ = pair(
        ask_at=asks, span_tokens=span, ask_tokens=ask, fails_at=fails_at, prices=PRICES, caches=cached
    )
    report = (await write(engine, {"cost": cost * MILLIONTH}, max_tokens=60)).report
    assert report.costs is not None
    assert report.costs.teacher.total <= cost * 10**6


async def test_calls_of_one_request_share_its_money(pair):
    """A response whose tools the gateway runs makes such calls."""
    engine, teacher = pair(ask_at=range(1000), prices=PRICES)
    exchange = Exchange(Budget(cost=200 * MILLIONTH))
    for _ in range(3):
        params = SamplingParams(max_tokens=15)
        _ = [output async for output in engine.generate(params, exchange)]
    assert exchange.total().as_dict()["cost"] == pytest.approx(cost_of(teacher))
    assert cost_of(teacher) <= 200.000001 * MILLIONTH
