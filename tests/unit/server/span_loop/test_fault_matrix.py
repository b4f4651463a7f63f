"""Every fault of a teacher, in every way of asking it: the table in docs/budgets.md.

The span loop, the pool and the client are the real ones, over a scripted student and a teacher that fails
on demand. Whatever goes wrong, the student writes the completion to its end. The tokens that the teacher has
written stay and are paid, and nothing else is paid: neither in the request's budget nor in the shared one. No
place at the teacher stays taken.
"""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import pytest
from aiohttp import web

from router.budget import Budget
from router.controller import PriceController
from router.ledger import MemoryLedger, TokensPerWindow
from router.policy import Calibration, Policy
from server.cooperation import Cooperation
from server.exchange import EXCHANGE, Exchange, Report
from server.shared_budgets import SharedBudgets
from server.teacher.ask import STREAM_ABOVE
from server.teacher.breaker import Breaker
from server.teacher.client import Teacher
from server.teacher.pool import TeacherPool
from server.vllm_api import SamplingParams
from tests.helpers.fake_teacher import Answer, Server, begin_events, body, choice, event
from tests.helpers.one_teacher import one_teacher
from tests.helpers.scripted_student import (
    DELTA,
    FINAL_ONLY,
    PROMPT,
    PROMPT_IDS,
    RESERVED,
    ScriptedLLM,
    cooperator,
)

pytestmark = pytest.mark.steady_time

CALIBRATION = Calibration(((0.5, 1.0),))
LENGTH = 30
SPANS = {"body": STREAM_ABOVE - 4, "stream": STREAM_ABOVE + 4}
KINDS = {"streaming client": DELTA, "waiting client": FINAL_ONLY}
PATIENCE, SPAN_PATIENCE, BREAKER_SECONDS = 0.25, 1.0, 0.3


# The faults


def capitals(prompt: list[int], count: int) -> list[int]:
    return [ord("A") + (len(prompt) - len(PROMPT_IDS) + i) % 26 for i in range(count)]


async def well(request: web.Request) -> web.StreamResponse:
    asked = await request.json()
    ids = capitals(asked["prompt"], asked["max_tokens"])
    if not asked["stream"]:
        return await body(choice(ids))(request)
    response = await begin_events(request)
    for token in ids[:-1]:
        await response.write(event(choice([token], None)))
    await response.write(event(choice(ids[-1:])) + event("[DONE]"))
    return response


async def hangs(request: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    return web.Response()


async def drips(request: web.Request) -> web.StreamResponse:
    """Send a token before every timeout, but the span after its deadline; send a body byte by byte."""
    asked = await request.json()
    response = await begin_events(request)
    for token in capitals(asked["prompt"], asked["max_tokens"]):
        await response.write(event(choice([token], None)) if asked["stream"] else b" ")
        await asyncio.sleep(PATIENCE / 2)
    return response


async def dies(request: web.Request) -> web.StreamResponse:
    """Die after the first token, or within the body."""
    asked = await request.json()
    response = await begin_events(request)
    if asked["stream"]:
        await response.write(event(choice(capitals(asked["prompt"], 1), None)))
        await asyncio.sleep(0.02)
    await response.write(b'data: {"choi')
    request.transport.abort()
    return response


@dataclass(frozen=True)
class Fault:
    answer: Answer | None
    """The teacher's answer; None: nobody listens at its address."""
    reason: str
    written: Callable[[bool], range] = lambda stream: range(1)
    """Possible numbers of the span's tokens that came, by whether it was streamed."""


FAULTS = {
    "refuses": Fault(None, "unreachable"),
    "hangs": Fault(hangs, "timeout"),
    "slow drip": Fault(drips, "timeout", lambda stream: range(8, 10) if stream else range(1)),
    "500": Fault(body({"error": "oops"}, 500), "status"),
    "wrong JSON": Fault(body("<html>"), "nonsense"),
    "wrong tokens": Fault(body(choice([RESERVED.escalation])), "nonsense"),
    "dies mid-stream": Fault(dies, "unreachable", lambda stream: range(1, 2) if stream else range(1)),
}
EVERY_FAULT = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
EVERY_SPAN = pytest.mark.parametrize("span_tokens", SPANS.values(), ids=SPANS)
EVERY_CLIENT = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


# The gateway


class Gateway:
    """An engine with one teacher, of as many replicas as there are answers."""

    def __init__(self, tokenizer: object, urls: list[str], span_tokens: int) -> None:
        replicas = [
            Teacher(
                url,
                model="big",
                timeout=PATIENCE,
                span_timeout=SPAN_PATIENCE,
                breaker=Breaker(2, BREAKER_SECONDS, time.monotonic),
                vocabulary=RESERVED.start,
            )
            for url in urls
        ]
        self.pool = TeacherPool(replicas, concurrency=4, queue_seconds=0.1)
        limit = TokensPerWindow(tokens=1000, window_seconds=3600)
        ledger, prices = MemoryLedger(clock=time.monotonic), PriceController(CALIBRATION, span_tokens)
        self.shared = SharedBudgets(ledger, prices, [limit])
        cooperation = Cooperation(
            teachers=one_teacher(self.pool),
            policy=Policy(CALIBRATION, expected_tokens=20),
            reserved=RESERVED,
            span_tokens=span_tokens,
            default_budget=Budget(fraction=0.5),
            shared=self.shared,
        )
        self.engine = cooperator(ScriptedLLM(tokenizer, {2}, None), cooperation)

    async def write(self, kind: object) -> tuple[str, Report]:
        exchange = self.exchange = Exchange(Budget(calls=1))
        token = EXCHANGE.set(exchange)
        params = SamplingParams(max_tokens=LENGTH, output_kind=kind)
        outputs = self.engine.generate(PROMPT, params, "r")
        EXCHANGE.reset(token)
        ids = [token async for output in outputs for token in output.outputs[0].token_ids]
        (report,) = exchange.reports
        return bytes(ids).decode(), report

    async def check_books(self, report: Report) -> None:
        """Check that written tokens are paid in every budget, and that nothing is reserved any more."""
        await asyncio.gather(*self.shared._tasks)
        (status,) = await self.shared.ledger.status(self.shared.everybody)
        assert (status.spent, status.reserved) == (report.tokens, 0)
        assert status.student_tokens == LENGTH - report.tokens
        ((purse,),) = self.exchange.purses.values()
        assert purse.bucket.spent == report.tokens
        assert all(replica.running == 0 for replica in self.pool.replicas)


@asynccontextmanager
async def gateway(
    tokenizer: object, span_tokens: int, *answers: Answer | None
) -> AsyncIterator[tuple[Gateway, list[Server]]]:
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(Server()) for _ in answers]
        deaf = stack.enter_context(socket.socket())  # bound, so that no other program gets the port
        deaf.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        urls = [server.url if answer else nobody for server, answer in zip(servers, answers, strict=True)]
        for server, answer in zip(servers, answers, strict=True):
            server.answers = [answer or well]
        gateway = Gateway(tokenizer, urls, span_tokens)
        await stack.enter_async_context(gateway.pool)
        for replica in gateway.pool.replicas:
            replica.up = replica.checked = True
        yield gateway, servers


def text(by_teacher: range) -> str:
    return "".join(chr(ord("A" if i in by_teacher else "a") + i % 26) for i in range(LENGTH))


# The matrix


@EVERY_FAULT
@EVERY_SPAN
@EVERY_CLIENT
async def test_the_student_goes_on_after_every_fault(
    tokenizer, fault: Fault, span_tokens: int, kind: object
) -> None:
    async with gateway(tokenizer, span_tokens, fault.answer) as (it, _):
        written, report = await asyncio.wait_for(it.write(kind), 5)
        assert report.tokens in fault.written(span_tokens > STREAM_ABOVE)
        assert written == text(range(2, 2 + report.tokens))
        assert (report.denied, report.degraded, report.calls) == ({fault.reason: 1}, True, 1)
        await it.check_books(report)


@EVERY_FAULT
@EVERY_SPAN
@EVERY_CLIENT
async def test_another_replica_takes_over_if_nothing_was_streamed(
    tokenizer, fault: Fault, span_tokens: int, kind: object
) -> None:
    async with gateway(tokenizer, span_tokens, fault.answer, well) as (it, _):
        it.pool._ranked = lambda key: it.pool.replicas  # the faulty one first
        written, report = await asyncio.wait_for(it.write(kind), 5)
        seen = 0 in fault.written(span_tokens > STREAM_ABOVE)
        assert report.degraded is not seen
        assert report.tokens == span_tokens if seen else report.tokens in fault.written(True)
        assert written == text(range(2, 2 + report.tokens))
        await it.check_books(report)


@EVERY_SPAN
@EVERY_CLIENT
async def test_a_teacher_that_recovers_is_asked_again(tokenizer, span_tokens: int, kind: object) -> None:
    """Its breaker opens and nobody asks it for a while. Then one call tries, and then all calls ask."""
    async with gateway(tokenizer, span_tokens, FAULTS["500"].answer) as (it, (server,)):
        for _ in range(2):
            await it.write(kind)
        written, report = await it.write(kind)
        assert (report.denied, report.calls) == ({"breaker": 1}, 0)
        assert (written, len(server.requests)) == (text(range(0)), 2)
        server.answers = [well]
        await asyncio.sleep(BREAKER_SECONDS)
        for _ in range(2):
            written, report = await it.write(kind)
            assert written == text(range(2, 2 + span_tokens))
            assert (report.denied, report.degraded) == ({}, False)
