"""The span loop: metrics, and noted failures."""

import asyncio

import pytest

from router.budget import Budget
from router.ledger import FractionOfTraffic
from server.exchange import Exchange, Report
from server.metrics import counted
from server.tenants import Tenant, hash_key
from server.vllm_api import GracefulHTTPError, SamplingParams, VLLMValidationError
from tests.helpers.scripted_pair import count, start, write
from tests.helpers.scripted_student import DELTA, FINAL_ONLY


async def test_requests_tokens_and_escalations_are_counted(pair):
    engine, _ = pair(ask_at={2})
    series = [
        ("wheels_requests_total", {"outcome": "finished"}, 1),
        ("wheels_completion_tokens_total", {"source": "student"}, 4),
        ("wheels_completion_tokens_total", {"source": "teacher"}, 2),
        ("wheels_escalations_total", {"decision": "granted", "reason": "gate"}, 1),
        ("wheels_teacher_rate_count", {}, 1),
        ("wheels_teacher_rate_sum", {}, 2 / 6),
    ]
    before = [count(name, **labels) for name, labels, _ in series]
    await write(engine, 0.5, max_tokens=6)
    after = [count(name, **labels) for name, labels, _ in series]
    assert [b - a for a, b in zip(before, after, strict=True)] == pytest.approx([n for *_, n in series])


async def test_a_degraded_request_is_counted_as_such(pair):
    engine, _ = pair(ask_at={2}, fails_at=2)
    series = [
        ("wheels_requests_total", {"outcome": "degraded"}),
        ("wheels_escalations_total", {"decision": "denied", "reason": "timeout"}),
    ]
    before = [count(name, **labels) for name, labels in series]
    await write(engine, 0.5)
    assert [count(name, **labels) for name, labels in series] == [n + 1 for n in before]


async def test_a_refusal_by_the_engine_amid_an_answer_is_an_error(pair):
    """It counts as one request more, and its tokens were written."""
    engine, _ = pair(ask_at={2})
    before = count("wheels_requests_total", outcome="error")
    outputs, exchange = start(engine, 0.5)
    await anext(outputs)
    with (
        pytest.raises(VLLMValidationError),
        counted(exchange.reports, budgeted=True, refusal=VLLMValidationError),
    ):
        raise VLLMValidationError("no logit_bias with drafts", parameter="logit_bias")
    await outputs.aclose()
    assert count("wheels_requests_total", outcome="error") - before == 1


@pytest.mark.parametrize("error", [VLLMValidationError("no", parameter="top_k"), RuntimeError("engine")])
def test_a_refusal_by_the_engine_is_not_counted_as_an_error(error):
    before = count("wheels_requests_total", outcome="error")
    with pytest.raises(type(error)), counted([Report()], budgeted=False, refusal=VLLMValidationError):
        raise error
    assert count("wheels_requests_total", outcome="error") - before == isinstance(error, RuntimeError)


async def test_the_steps_of_a_beam_search_are_not_counted_as_completions(pair):
    """The client gets two choices of nine tokens together, after any number of steps."""
    engine, _ = pair()
    window = FractionOfTraffic(fraction=0.5, window_seconds=60)
    tenant = Tenant(name="acme", keys=[hash_key("k")], limits=[window])
    before = count("wheels_requests_total", outcome="finished")
    tokens = count("wheels_completion_tokens_total", source="student")
    exchanges = []
    for _ in range(5):
        result = await write(engine, 0, max_tokens=1, searches=True, tenant=tenant)
        exchanges.append(result.exchange)
    assert exchanges[-1].reports == []
    exchanges[-1].end_search(2, 9)
    shared = engine.cooperator.cooperation.shared
    await asyncio.gather(*shared._tasks)
    (status,) = await shared.ledger.status(tenant.scopes)
    assert status.student_tokens == 9
    assert count("wheels_requests_total", outcome="finished") - before == 2
    assert count("wheels_completion_tokens_total", source="student") - tokens == 9


@pytest.mark.parametrize("kind", [DELTA, FINAL_ONLY])
async def test_why_a_request_failed_is_noted(pair, kind):
    engine, _ = pair(ask_at={2}, fails_at=3, on_teacher_error="error")
    outputs, exchange = start(engine, 0.5, output_kind=kind)
    with pytest.raises(GracefulHTTPError) as error:
        _ = [output async for output in outputs]
    assert exchange.failure is error.value


async def test_why_a_request_was_refused_is_noted(pair):
    engine, _ = pair()
    exchange = Exchange(Budget(fraction=0.5))
    with pytest.raises(VLLMValidationError) as error:
        engine.generate(SamplingParams(repetition_penalty=1.2, presence_penalty=1.0), exchange)
    assert exchange.failure is error.value
