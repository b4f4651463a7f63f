"""The span loop: requests that share the budget of a session."""

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.ledger import CostPerWindow
from router.money import PriceList
from server.sessions import OpenSession, SessionBudget
from server.shared_budgets import SharedBudgets
from tests.helpers.scripted_pair import on_the_books, shared_by_all, write

PRICES = PriceList.model_validate(
    {"student": {"input": 0, "output": 0}, "teacher": {"input": 2, "cached_input": 0.5, "output": 10}}
)
MILLIONTH = 1e-6


async def session(shared: SharedBudgets, **budget: Any) -> OpenSession:
    return await shared.open_session(None, SessionBudget(id="run-7", **budget), "teacher_session")


async def test_requests_of_a_session_share_its_tokens(pair):
    shared = shared_by_all()
    engine, _ = pair(ask_at=range(100), shared=shared)
    written = []
    for _ in range(3):
        mine = await session(shared, tokens=7)
        result = await write(engine, 0.5, max_tokens=10, session=mine)
        written.append(result.report.tokens)
        report = await mine.report()
        assert report == {"id": "run-7", "tokens": 7, "tokens_spent": sum(written)}
    assert sum(written) == 7
    assert written[0] > 0
    assert result.report.denied.keys() == {"session_tokens"}
    assert not result.report.degraded


async def test_requests_of_a_session_share_its_money(pair):
    """Whatever the teacher has in its cache, the real cost of its calls stays within 200 millionths."""
    shared = shared_by_all()
    engine, _ = pair(ask_at=range(100), shared=shared, prices=PRICES, caches=0.5)
    cost = 0.0
    for _ in range(4):
        mine = await session(shared, cost=200 * MILLIONTH)
        report = (await write(engine, 0.5, max_tokens=20, session=mine)).report.as_dict()
        cost += report["cost"]
        assert (await mine.report())["cost_spent"] == pytest.approx(cost)
    assert 0 < cost <= 200 * MILLIONTH
    assert report["denied"] == {"session_cost": 1}


async def test_the_report_waits_for_settlements_under_way(pair):
    """A client leaves within a span, so the report is read while the span loop is being stopped."""
    shared = shared_by_all()
    engine, _ = pair(ask_at=range(100), shared=shared)
    sessions = [await session(shared, tokens=50) for _ in range(5)]
    results = await asyncio.gather(*(write(engine, 0.5, max_tokens=10, session=mine) for mine in sessions))
    spent = sum(result.report.tokens for result in results)
    for mine in sessions:
        assert (await mine.report())["tokens_spent"] == spent


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(
    cost=st.integers(1, 2000),
    cached=st.floats(0, 1),
    spans=st.sampled_from([(1, 1), (4, 1), (4, 4), (16, 8)]),
    fails_at=st.none() | st.integers(0, 29),
    asks=st.lists(st.sets(st.integers(0, 29)), min_size=2, max_size=4),
)
async def test_money_that_requests_share_is_never_exceeded(pair, cost, cached, spans, fails_at, asks):
    """Requests of one session run at once under one limit, each with a budget of its own."""
    limit = CostPerWindow(cost=cost * MILLIONTH, window_seconds=3600)
    shared = shared_by_all(limit)
    mine = await session(shared, cost=cost * MILLIONTH * 0.9)
    span, ask = spans
    results = []
    engines = [
        pair(
            ask_at=places,
            span_tokens=span,
            ask_tokens=ask,
            fails_at=fails_at,
            shared=shared,
            prices=PRICES,
            caches=cached,
        )[0]
        for places in asks
    ]
    budget = {"fraction": 0.9, "cost": 500 * MILLIONTH}
    writing = [
        write(engine, budget, max_tokens=30, session=mine if place % 2 else None)
        for place, engine in enumerate(engines)
    ]
    results = await asyncio.gather(*writing)
    costs = [result.report.costs.teacher.total for result in results]
    assert max(costs) <= 500 * 10**6
    assert sum(costs) <= cost * 10**6
    assert sum(costs[1::2]) <= cost * 10**6 * 0.9 + 1
    spent, reserved, _ = await on_the_books(shared)
    assert reserved == 0
    assert sum(costs) <= spent * 1000 <= cost * 10**6
    if fails_at is None:
        assert spent * 1000 - sum(costs) <= 1000 * sum(result.report.calls for result in results)
