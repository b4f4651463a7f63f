"""A pair of a scripted vLLM and a scripted teacher, with calls for tests of the span loop."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import REGISTRY

from router.budget import Budget
from router.controller import PriceController
from router.ledger import Limit, MemoryLedger, TokensPerWindow
from router.policy import Calibration
from server.completion import Piece
from server.cooperation import Cooperation
from server.exchange import EXCHANGE, Exchange, Report
from server.shared_budgets import SharedBudgets
from server.teacher.ask import Ask
from server.teacher.breaker import Breaker
from server.teacher.errors import TeacherError
from server.vllm_api import CompletionOutput, Logprob, RequestOutput, SamplingParams
from tests.helpers.scripted_student import DELTA, EOS, PROMPT, PROMPT_IDS, ScriptedLLM, cooperator, letter

CALIBRATION = Calibration(((0.5, 1.0),))


@dataclass
class Call:
    """A call that reached the teacher."""

    prefix: list[int]
    tokens: int
    min_tokens: int
    seed: int | None
    request_id: str
    deadline: float
    closed: bool = False


@dataclass
class ScriptedTeacher:
    """A teacher that writes one token per piece; it fails, hangs or ends at places that a test sets."""

    breaker: Breaker = field(default_factory=lambda: Breaker(1, 60.0))
    max_model_len: int | None = None
    ends_at: int | None = None
    fails_at: int | None = None
    hangs_at: int | None = None
    writes_on: bool = False
    """Whether it goes on writing tokens although the call is cancelled while it hangs."""
    refuses: str | None = None
    caches: float = 0.0
    """Share of every prompt that it reports as cached."""
    first: str = "A"
    """Letter that it writes at the beginning of a completion; later places have the letters after it."""
    calls: list[Call] = field(default_factory=list)
    asks: list[Ask] = field(default_factory=list)
    hanging: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    admitted: list[bytes] = field(default_factory=list)
    released: int = 0

    @property
    def down(self) -> bool:
        return self.breaker.open

    async def admit(self, key: bytes) -> "ScriptedTeacher":
        await asyncio.sleep(0)
        if not self.breaker.allow():
            raise TeacherError("breaker", "the script says so")
        if self.refuses is not None:
            raise TeacherError(self.refuses, "the script says so")
        self.admitted.append(key)
        return self

    def release(self) -> None:
        self.released += 1

    async def write(
        self,
        slot: "ScriptedTeacher",
        ask: Ask,
        *,
        request_id: str,
        deadline: float,
    ) -> AsyncIterator[Piece]:
        prompt_ids, tokens, params = ask.prompt_ids, ask.tokens, ask.params
        call = Call(list(prompt_ids), tokens, ask.min_tokens, ask.seed, request_id, deadline)
        self.calls.append(call)
        self.asks.append(ask)
        ask.meter.begin(len(prompt_ids), tokens)
        try:
            for written in range(tokens):
                await asyncio.sleep(0)
                piece = await self._piece(
                    len(prompt_ids) - len(PROMPT_IDS) + written, written + 1 == tokens, params
                )
                ask.meter.wrote(1)
                if piece.finish_reason is not None:
                    ask.meter.report(int(self.caches * len(prompt_ids)), written + 1)
                yield piece
                if self.ends_at == len(prompt_ids) - len(PROMPT_IDS) + written:
                    return
        except TeacherError:
            ask.meter.failed(reached=True)
            raise
        finally:
            call.closed = True

    async def _piece(self, place: int, full: bool, params: SamplingParams) -> Piece:
        if place == self.fails_at:
            raise TeacherError("timeout", "the script says so")
        if place == self.hangs_at:
            self.hanging.release()
            with contextlib.suppress(asyncio.CancelledError if self.writes_on else ()):
                await asyncio.Event().wait()
        ends = place == self.ends_at
        token = EOS if ends else letter(place, self.first)
        logprobs = None if params.logprobs is None else [{token: Logprob(-0.5)}]
        return Piece([token], logprobs, "stop" if ends else "length" if full else None)


class Engine:
    """The tested engine over a scripted vLLM, with the exchange of its last request."""

    def __init__(self, vllm: ScriptedLLM, cooperation: Cooperation, **student: Any) -> None:
        self.cooperator = cooperator(vllm, cooperation, **student)
        self.segments = vllm.segments
        self.exchange = Exchange()

    def generate(
        self, params: SamplingParams, exchange: Exchange, prompt: Any = PROMPT, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        self.exchange = exchange
        token = EXCHANGE.set(exchange)
        try:
            return self.cooperator.generate(prompt, params, "r", **options)
        finally:
            EXCHANGE.reset(token)

    @property
    def spent(self) -> list[int]:
        """Teacher tokens that the bucket of every choice has spent."""
        return [purse.bucket.spent for purses in self.exchange.purses.values() for purse in purses]


@dataclass
class Result:
    outputs: list[RequestOutput]
    exchange: Exchange

    @property
    def report(self) -> Report:
        (report,) = self.exchange.reports
        return report

    def text(self, index: int = 0) -> str:
        return bytes(token for token in self.ids(index) if token < EOS).decode()

    def ids(self, index: int = 0) -> list[int]:
        """Token ids of a choice, joined from DELTA outputs."""
        return [token for new in self.choice(index) for token in new.token_ids]

    def choice(self, index: int = 0) -> list[CompletionOutput]:
        return [new for output in self.outputs for new in output.outputs if new.index == index]

    @property
    def last(self) -> CompletionOutput:
        return self.outputs[-1].outputs[-1]


def start(
    engine: Engine, budget: object = None, *, unsupported: str | None = None, **params: Any
) -> tuple[AsyncGenerator[RequestOutput, None], Exchange]:
    exchange = Exchange(None if budget is None else Budget.model_validate(budget), unsupported)
    for name in ("searches", "writes_nothing", "names", "tenant", "session", "model", "budget_name"):
        setattr(exchange, name, params.pop(name, getattr(exchange, name)))
    options = params.pop("options", {})
    prompt = params.pop("prompt", PROMPT)
    sampling = SamplingParams(**{"max_tokens": 8, "output_kind": DELTA} | params)
    return engine.generate(sampling, exchange, prompt, **options), exchange


async def write(engine: Engine, budget: object = None, **params: Any) -> Result:
    outputs, exchange = start(engine, budget, **params)
    return Result([output async for output in outputs], exchange)


def count(name: str, **labels: str) -> float:
    """The sum of the series that have these labels."""
    total = 0.0
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                total += sample.value
    return total


def spent(engine: Engine) -> tuple[int, int]:
    """Teacher tokens and calls that the bucket of the only choice has spent."""
    ((purse,),) = engine.exchange.purses.values()
    return purse.bucket.spent, purse.bucket.calls


def shared_by_all(*limits: Limit, **ledger: Any) -> SharedBudgets:
    return SharedBudgets(MemoryLedger(**ledger), PriceController(CALIBRATION, 2), limits)


def tokens(count: int) -> TokensPerWindow:
    return TokensPerWindow(tokens=count, window_seconds=3600)


async def on_the_books(shared: SharedBudgets) -> tuple[int, int, int]:
    """(spent, reserved, student's) tokens under the only limit, after everything is settled."""
    await shared.aclose()
    (status,) = await shared.ledger.status(shared.everybody)
    return status.spent, status.reserved, status.student_tokens


async def collect(outputs: AsyncGenerator[RequestOutput, None]) -> list[RequestOutput]:
    return [output async for output in outputs]
