"""The span loop: budgets that requests share."""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from router.budget import Budget
from router.ledger import FractionOfTraffic
from server.exchange import Exchange
from server.tenants import Tenant, hash_key
from server.vllm_api import RequestOutput, SamplingParams, VLLMValidationError
from tests.helpers.scripted_pair import (
    Engine,
    collect,
    on_the_books,
    shared_by_all,
    spent,
    start,
    tokens,
    write,
)
from tests.helpers.scripted_student import DELTA, INF


async def test_spans_are_reserved_and_settled(pair):
    shared = shared_by_all(tokens(100))
    engine, _ = pair(ask_at={2, 6}, shared=shared)
    result = await write(engine, 0.5, max_tokens=10)
    assert result.text() == "abCDefGHij"
    assert await on_the_books(shared) == (4, 0, 6)


async def test_a_span_that_is_asked_for_token_by_token_is_reserved_once(pair):
    shared = shared_by_all(tokens(100))
    engine, _ = pair(ask_at={2, 3, 4, 5}, span_tokens=4, ask_tokens=1, shared=shared)
    leases, reserve = [], shared.ledger.reserve

    async def counting(*arguments: Any, **options: Any) -> Any:
        leases.append(await reserve(*arguments, **options))
        return leases[-1]

    shared.ledger.reserve = counting
    result = await write(engine, 0.5, max_tokens=10)
    assert (result.text(), result.report.calls) == ("abCDEFghij", 4)
    assert [lease.tokens for lease in leases] == [4]
    assert await on_the_books(shared) == (4, 0, 6)


async def test_unwritten_tokens_are_given_back(pair):
    shared = shared_by_all(tokens(100))
    engine, _ = pair(ask_at={2}, span_tokens=4, shared=shared, fails_at=3)
    await write(engine, 0.9, max_tokens=8)
    assert await on_the_books(shared) == (1, 0, 7)


async def test_a_shared_limit_refuses_and_the_student_goes_on(pair):
    """The first span gets the only two tokens. The next ask comes after a while, and is refused again."""
    shared = shared_by_all(tokens(2))
    engine, teacher = pair(ask_at={1, 5, 6, 7, 45}, span_tokens=4, shared=shared)
    result = await write(engine, 0.9, max_tokens=60)
    assert [call.tokens for call in teacher.calls] == [2]
    assert result.report.spans == [[1, 3]]
    assert result.report.denied == {"global_tokens": 2}, "at 5, and again at 45, PAUSE_TOKENS later"
    assert not result.report.degraded
    assert spent(engine) == (2, 1)
    assert await on_the_books(shared) == (2, 0, 58)


async def test_a_request_that_may_have_everything_reserves_a_little_at_a_time(pair):
    shared = shared_by_all(tokens(10_000))
    engine, teacher = pair(shared=shared)
    result = await write(engine, 1, max_tokens=150)
    assert [call.tokens for call in teacher.calls] == [64, 64, 22]
    assert result.report.calls == 3
    assert await on_the_books(shared) == (150, 0, 0)


async def test_a_span_ends_with_its_lease(pair):
    """No token may come after the lease's deadline. Without shared limits there is no deadline."""
    shared = shared_by_all(tokens(100), lease_seconds=10)
    engine, teacher = pair(ask_at={2}, shared=shared)
    before = time.monotonic()
    await write(engine, 0.5)
    assert before + 8 <= teacher.calls[0].deadline <= time.monotonic() + 8
    engine, teacher = pair(ask_at={2})
    await write(engine, 0.5)
    assert teacher.calls[0].deadline == INF


async def test_a_client_that_leaves_in_a_span_pays_for_what_was_written(pair):
    shared = shared_by_all(tokens(100))
    engine, teacher = pair(ask_at={2}, span_tokens=4, hangs_at=3, shared=shared)
    outputs, _ = start(engine, 0.9, max_tokens=8)
    reading = asyncio.create_task(collect(outputs))
    await teacher.hanging.acquire()
    reading.cancel()
    await asyncio.wait([reading])
    await outputs.aclose()
    assert await on_the_books(shared) == (1, 0, 2)


async def test_requests_without_a_teacher_count_as_traffic(pair):
    shared = shared_by_all(tokens(100))
    engine, _ = pair(shared=shared)
    await write(engine, 0, max_tokens=8)
    assert await on_the_books(shared) == (0, 0, 8)


async def test_the_shared_price_is_the_requests_price(pair):
    """A limit of 0 makes the price infinite, once the ledger has answered."""
    shared = shared_by_all(FractionOfTraffic(fraction=0.0, window_seconds=60))
    engine, teacher = pair(ask_at={2}, shared=shared)
    await shared.share(None).reserve(1, 1)  # refused
    await shared.update()
    result = await write(engine, 1, max_tokens=8)
    assert result.text() == "abcdefgh"
    assert teacher.calls == []
    assert result.report.denied == {}


async def test_a_tenants_maximum_clamps_or_refuses_a_budget(pair):
    engine, teacher = pair(ask_at={0, 2, 4}, default=0.5)
    keys = (hash_key("secret"),)
    clamping = Tenant(name="acme", keys=keys, maximum_budget={"calls": 1})
    exchange = Exchange(Budget(calls=3), tenant=clamping)
    await collect(generate(engine, exchange))
    assert len(teacher.calls) == 1
    assert exchange.total().as_dict()["clamped"] is True
    exchange = Exchange(tenant=clamping)
    await collect(generate(engine, exchange))
    assert exchange.total().as_dict()["clamped"] is False
    refusing = clamping.model_copy(update={"over_maximum": "refuse"})
    with pytest.raises(VLLMValidationError, match="calls 3 is more than this key's maximum of 1"):
        generate(engine, Exchange(Budget(calls=3), tenant=refusing))


MODELS = {"wheels-fast": 0, "wheels-best": 1, "wheels-careful": {"calls": 2}}


@pytest.mark.parametrize(
    ("model", "budget", "calls"),
    [
        ("wheels", None, 1),  # the default
        ("", None, 1),
        ("an-adapter", None, 1),
        ("wheels-fast", None, 0),
        ("wheels-best", None, 1),
        ("wheels-careful", None, 2),
        ("wheels-fast", {"calls": 3}, 3),  # the sent budget wins
        ("wheels-best", 0, 0),
    ],
)
async def test_the_name_of_a_model_is_a_budget(pair, model, budget, calls):
    engine, teacher = pair(ask_at={0, 2, 4}, default=0.1, models=MODELS)
    result = await write(engine, budget, model=model)
    assert len(teacher.calls) == result.report.calls == calls
    assert (result.text() == "ABCDEFGH") == (model == "wheels-best" and budget is None)
    assert result.report.clamped is False


async def test_a_name_refuses_no_parameter(pair):
    """A program that can only choose a model cannot leave the parameter out: the student answers alone."""
    engine, teacher = pair(ask_at={0}, default=0, models=MODELS)
    result = await write(engine, model="wheels-best", unsupported="use_beam_search")
    assert result.text() == "abcdefgh"
    assert teacher.calls == []


async def test_a_budget_in_a_header_refuses_like_one_in_the_body(pair):
    engine, _ = pair(models=MODELS)
    header = {"model": "wheels-fast", "budget_name": "X-Teacher-Budget"}
    with pytest.raises(VLLMValidationError, match="cannot be used") as error:
        start(engine, 0.5, unsupported="use_beam_search", **header)
    assert error.value.parameter == "use_beam_search"


async def test_a_name_is_held_to_a_tenants_maximum(pair):
    engine, teacher = pair(ask_at={0, 2, 4}, default=0, models=MODELS)
    keys = (hash_key("secret"),)
    clamping = Tenant(name="acme", keys=keys, default_budget=0, maximum_budget={"calls": 1})
    result = await write(engine, model="wheels-careful", tenant=clamping)
    assert (len(teacher.calls), result.report.clamped) == (1, True)
    refusing = clamping.model_copy(update={"over_maximum": "refuse"})
    for budget, name, parameter in (
        (None, "teacher_budget", "model"),
        ({"calls": 2}, "teacher_budget", "teacher_budget"),
        ({"calls": 2}, "X-Teacher-Budget", "X-Teacher-Budget"),
    ):
        with pytest.raises(VLLMValidationError, match="calls 2 is more than this key's") as error:
            start(engine, budget, model="wheels-careful", tenant=refusing, budget_name=name)
        assert error.value.parameter == parameter


def generate(engine: Engine, exchange: Exchange) -> AsyncGenerator[RequestOutput, None]:
    return engine.generate(SamplingParams(max_tokens=8, output_kind=DELTA), exchange)


async def test_a_tenants_limit_and_the_global_limit_both_hold(pair):
    shared = shared_by_all(tokens(100))
    engine, _ = pair(ask_at={2, 4}, span_tokens=2, shared=shared)
    tenant = Tenant(name="acme", keys=(hash_key("secret"),), limits=(tokens(3),))
    exchange = Exchange(Budget(calls=5), tenant=tenant)
    await collect(generate(engine, exchange))
    await shared.aclose()
    own, everybody = await shared.ledger.status([*tenant.scopes, *shared.everybody])
    assert (own.spent, everybody.spent) == (3, 3)
    assert exchange.total().as_dict()["tokens"] == 3
