"""The span loop: the budget of a request."""

import asyncio

import pytest

from router.budget import Budget
from server.exchange import Exchange, Report
from server.vllm_api import SamplingParams
from tests.helpers.scripted_pair import collect, spent, write
from tests.helpers.scripted_student import CUMULATIVE, DELTA, FINAL_ONLY, INF

# Budgets


async def test_a_budget_of_0_is_one_plain_request(pair):
    engine, teacher = pair(ask_at={2})
    result = await write(engine, 0, temperature=0.3, options={"trace_headers": {}})
    assert result.text() == "abcdefgh"
    assert teacher.calls == []
    (segment,) = engine.segments
    assert (segment.request_id, segment.options, segment.price) == (
        "r",
        {"trace_headers": {}, "priority": 1},
        INF,
    )
    assert segment.params.temperature == 0.3
    assert segment.params.extra_args is None
    assert result.report.as_dict() | {"rate": 0} == Report().as_dict()
    assert result.report.completion_tokens == 8
    assert result.exchange.finished


@pytest.mark.parametrize("kind", [DELTA, CUMULATIVE, FINAL_ONLY])
async def test_a_plain_requests_tokens_are_counted(pair, kind):
    engine, _ = pair(ends_at=4)
    assert (await write(engine, 0, output_kind=kind)).report.completion_tokens == 5


async def test_a_budget_of_1_is_one_call(pair):
    engine, teacher = pair()
    result = await write(engine, 1)
    assert result.text() == "ABCDEFGH"
    assert engine.segments == []
    assert [call.tokens for call in teacher.calls] == [8]
    assert (result.report.calls, result.report.spans) == (1, [[0, 8]])


async def test_without_a_budget_the_default_holds(pair):
    engine, teacher = pair(ask_at={2}, default=0.5)
    assert (await write(engine)).text() == "abCDefgh"
    engine, teacher = pair(ask_at={2}, default=0)
    assert (await write(engine)).text() == "abcdefgh"
    assert teacher.calls == []


async def test_a_spent_budget_forbids_asking(pair):
    engine, _ = pair(ask_at=range(100))
    result = await write(engine, {"tokens": 3}, max_tokens=10)
    assert result.text() == "ABCdefghij"
    assert [segment.price for segment in engine.segments][-1] == INF
    assert result.report.denied == {}  # nothing was refused


async def test_tokens_that_cover_the_plan_are_one_call(pair):
    engine, teacher = pair(ask_at=range(100))
    result = await write(engine, {"tokens": 50}, max_tokens=60)  # 20 tokens are expected
    assert [call.tokens for call in teacher.calls] == [50]
    assert (result.report.tokens, result.report.calls) == (50, 1)
    assert result.report.spans == [[0, 50]]


async def test_the_terms_travel_with_each_segment(pair):
    engine, _ = pair(ask_at={0, 4})
    await write(engine, 0.25, max_tokens=20, extra_args={"caller": "x"})
    # after the first span: 2 + 2 <= 0.25 * (length + 2) + 2 from a length of 6, four tokens later
    assert [(s.price, s.not_before) for s in engine.segments] == [(1.0, 0), (1.0, 4)]
    assert all(segment.params.extra_args["caller"] == "x" for segment in engine.segments)


@pytest.mark.parametrize(("span_tokens", "ask_tokens"), [(1, 1), (2, 2), (3, 1), (8, 8), (8, 3)])
@pytest.mark.parametrize(
    "budget", [0.05, 0.1, 0.25, 0.5, 0.9, {"tokens": 7}, {"calls": 3}, {"fraction": 0.3, "tokens": 9}]
)
async def test_a_student_that_always_asks_stays_within_its_budget(pair, budget, span_tokens, ask_tokens):
    engine, _ = pair(ask_at=range(1000), span_tokens=span_tokens, ask_tokens=ask_tokens)
    result = await write(engine, budget, max_tokens=120)
    bound = Budget.model_validate(budget)
    by_teacher = [character.isupper() for character in result.text()]
    assert any(by_teacher)
    for length in range(1, len(by_teacher) + 1):
        tokens = sum(by_teacher[:length])
        if bound.fraction is not None:
            assert tokens <= bound.fraction * length + span_tokens + 1e-9
        assert bound.tokens is None or tokens <= bound.tokens
    assert bound.calls is None or result.report.calls <= bound.calls
    assert result.report.tokens == sum(by_teacher)
    assert result.report.denied == {}


# A request for which the engine is called several times


@pytest.mark.parametrize("budget", [0.25, {"tokens": 5}, {"calls": 2}, {"fraction": 0.5, "tokens": 7}])
async def test_calls_one_after_the_other_share_the_requests_budget(pair, budget):
    """A response whose tools the gateway runs makes such calls."""
    engine, _ = pair(ask_at=range(1000), span_tokens=2)
    exchange, text = Exchange(Budget.model_validate(budget)), ""
    for _ in range(3):
        params = SamplingParams(max_tokens=15, output_kind=DELTA)
        for output in await collect(engine.generate(params, exchange)):
            text += bytes(output.outputs[0].token_ids).decode()
    bound, report = exchange.budget, exchange.total()
    assert (len(text), report.completion_tokens) == (45, 45)
    assert report.tokens == sum(map(str.isupper, text)) == spent(engine)[0]
    assert report.calls == spent(engine)[1]
    assert report.tokens <= (bound.tokens or 45)
    assert report.calls <= (bound.calls or 45)
    if bound.fraction:
        for end in range(1, 46):
            assert sum(map(str.isupper, text[:end])) <= bound.fraction * end + 2


async def test_prompts_of_one_request_have_a_budget_each(pair):
    engine, _ = pair(ask_at=range(1000))
    exchange = Exchange(Budget(tokens=3))
    params = SamplingParams(max_tokens=8, output_kind=DELTA, n=2)
    calls = [engine.generate(params, exchange) for _ in range(2)]
    await asyncio.gather(*map(collect, calls))
    assert engine.spent == [3] * 4
