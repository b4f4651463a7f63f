"""Prices that prompts teach a gateway, whose completions come from the real calibration and bucket."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from measuring.gateway import GatewayClient, GatewayReply
from server.local.rates import NothingToLearn, RateFinder, RatePass
from tests.helpers.learning_gateway import LearningGateway

PROMPTS = [f"prompt {number}" for number in range(100)]
FEW = 8


def answering(gateway: LearningGateway) -> Callable[[httpx.Request], httpx.Response]:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=gateway.answer(request.url.path, request.content))

    return answer


def finder(gateway: LearningGateway, prompts: int = FEW, **settings: Any) -> RateFinder:
    transport = httpx.AsyncClient(transport=httpx.MockTransport(answering(gateway)))
    client = GatewayClient("http://there", concurrency=4, transport=transport)
    return RateFinder(client, PROMPTS[:prompts], **{"passes": 5, "tolerance": 0.02} | settings)


def found(made: RateFinder, *rates: float) -> RateFinder:
    async def go() -> None:
        async with made.client:
            await made.find(rates)

    asyncio.run(go())
    return made


def test_every_rate_is_realised_and_has_a_price() -> None:
    gateway = LearningGateway()
    made = found(finder(gateway, prompts=100), 0.05, 0.2)
    assert sorted(made.last) == [0.05, 0.2]
    for rate, realised in made.last.items():
        assert realised.rate == pytest.approx(rate, abs=0.02)
        assert realised.passes >= 2
        assert made.price(rate) == gateway.traffic.calibration.price(rate)
    assert made.far() == []


def test_a_rate_that_is_realised_is_not_asked_for_again() -> None:
    gateway = LearningGateway()
    found(finder(gateway, tolerance=1.0, passes=9), 0.1)
    assert gateway.budgets == [0.1] * 2 * FEW


def test_the_passes_end_even_if_a_rate_is_not_realised() -> None:
    gateway = LearningGateway()
    made = found(finder(gateway, tolerance=0.0, passes=3), 0.1)
    assert len(gateway.budgets) == 3 * FEW
    assert made.last[0.1].passes == 3
    assert made.far() == [0.1]


def test_every_pass_and_reply_is_reported() -> None:
    passes: list[tuple[float, int]] = []
    replies: list[None] = []

    def start(rate: float, number: int) -> Any:
        passes.append((rate, number))
        return lambda: replies.append(None)

    found(finder(LearningGateway(), tolerance=1.0, start=start), 0.1, 0.3)
    assert passes == [(0.1, 1), (0.3, 1), (0.1, 2), (0.3, 2)]
    assert len(replies) == 4 * FEW


def test_a_gateway_with_measured_prices_is_not_asked_for_completions() -> None:
    gateway = LearningGateway(learned=False)
    with pytest.raises(NothingToLearn, match="the gateway's prices are not learned"):
        found(finder(gateway), 0.1)
    assert gateway.budgets == []


def test_a_key_with_a_smaller_maximum_is_reported() -> None:
    with pytest.raises(NothingToLearn, match=r"--rates: 0\.1 is above the maximum_budget"):
        found(finder(LearningGateway(teacher={"clamped": True})), 0.1)


def reply(tokens: int, teacher: int, **more: Any) -> GatewayReply:
    return GatewayReply("", [7] * tokens, [], 4, teacher, 1, **{"degraded": False} | more)


def test_a_pass_counts_tokens_lost_teachers_and_limits() -> None:
    replies = [
        reply(10, 1),
        reply(20, 2, degraded=True, denied={"breaker": 1}),
        reply(10, 1, denied={"global_fraction": 2, "tenant_tokens": 1}),
    ]
    realised = RatePass.of(0.2, 2, replies)
    assert (realised.teacher_tokens, realised.completion_tokens, realised.rate) == (4, 40, 0.1)
    assert (realised.degraded, realised.limited) == (1, 1)
    assert realised.is_near(0.11)
    assert not realised.is_near(0.09)
