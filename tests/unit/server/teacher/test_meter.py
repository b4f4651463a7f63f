"""The costs that a teacher's replies report."""

from collections.abc import AsyncIterator

import pytest

from router.money import TokenPrices, TokenUsage, picos
from server.teacher.ask import Ask
from server.teacher.breaker import Breaker
from server.teacher.client import Teacher
from server.teacher.errors import TeacherError
from server.teacher.meter import Meter
from server.vllm_api import SamplingParams
from tests.helpers.fake_teacher import Server, body, choice, stream

PRICES = TokenPrices(input=2, cached_input=0.5, output=10)
PROMPT = list(range(100))


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with Server() as server:
        yield server


async def metered(server: Server, tokens: int = 4, *, most: int | None = None) -> Meter:
    """The meter of one span, however the span ends."""
    meter = Meter(PRICES, most)
    ask = Ask(PROMPT, tokens, SamplingParams(), meter=meter)
    async with Teacher(server.url, breaker=Breaker(100, 60.0), vocabulary=50, timeout=30.0) as teacher:
        try:
            async for _ in teacher.write(ask, request_id="r"):
                pass
        except TeacherError:
            pass
    return meter


def usage(written: int, cached: int | None) -> dict[str, object]:
    details = None if cached is None else {"cached_tokens": cached}
    counted = {"prompt_tokens": 100, "completion_tokens": written, "prompt_tokens_details": details}
    return {"choices": [], "usage": counted}


async def test_a_body_says_what_was_cached(server):
    server.answers = [body(choice([1, 2, 3, 4]) | {"usage": usage(4, 64)["usage"]})]
    meter = await metered(server)
    assert meter.usage == TokenUsage(input=36, cached_input=64, output=4)
    assert meter.cost == picos(0.000144)
    assert "stream_options" not in server.bodies[0]


async def test_a_stream_says_it_in_an_event_of_its_own(server):
    ids = list(range(9))
    server.answers = [stream(choice(ids[:5], None), choice(ids[5:]), usage(9, 64))]
    meter = await metered(server, 9)
    assert meter.usage == TokenUsage(input=36, cached_input=64, output=9)
    assert server.bodies[0]["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("cached", [None, 0, -3])
async def test_tokens_that_are_not_reported_as_cached_count_as_read(server, cached):
    server.answers = [body(choice([1, 2]) | {"usage": usage(2, cached)["usage"]})]
    assert (await metered(server)).usage == TokenUsage(input=100, output=2)


async def test_no_more_is_cached_than_was_sent(server):
    server.answers = [body(choice([1, 2]) | {"usage": usage(2, 1000)["usage"]})]
    assert (await metered(server)).usage == TokenUsage(cached_input=100, output=2)


async def test_a_request_that_is_repeated_is_read_twice(server):
    """The teacher writes id 77, which the student does not have. That token is paid all the same."""
    server.answers = [
        body(choice([1, 77, 3]) | {"usage": usage(3, 0)["usage"]}),
        body(choice([2, 3, 4]) | {"usage": usage(3, 96)["usage"]}),
    ]
    meter = await metered(server)
    assert meter.usage == TokenUsage(input=100 + 5, cached_input=96, output=6)


async def test_a_request_is_not_repeated_if_the_money_is_for_one(server):
    server.answers = [body(choice([1, 77, 3]) | {"usage": usage(3, 0)["usage"]})]
    meter = await metered(server, most=PRICES.most(100, 4))
    assert len(server.bodies) == 1
    assert meter.cost <= PRICES.most(100, 4)


async def test_an_error_costs_nothing(server):
    server.answers = [body({"error": "full"}, status=503)]
    meter = await metered(server)
    assert (meter.usage, meter.cost) == (TokenUsage(), 0)


async def test_the_prompt_of_an_unusable_reply_is_paid(server):
    server.answers = [body("what?")]
    meter = await metered(server)
    assert (meter.usage, meter.cost) == (TokenUsage(input=100), None), "and what was written, nobody knows"


async def test_without_prices_no_usage_is_asked_for(server):
    server.answers = [stream(choice(list(range(9))))]
    async with Teacher(server.url, breaker=Breaker(100, 60.0), vocabulary=50) as teacher:
        _ = [piece async for piece in teacher.write(Ask(PROMPT, 9, SamplingParams()), request_id="r")]
    assert "stream_options" not in server.bodies[0]
