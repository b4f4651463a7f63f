"""The span loop over a scripted vLLM and a scripted teacher (see `scripted_student`)."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any

import pytest
from prometheus_client import REGISTRY
from scripted_student import (
    CUMULATIVE,
    DELTA,
    EOS,
    FINAL_ONLY,
    INF,
    PROMPT,
    PROMPT_IDS,
    RESERVED,
    VOCABULARY,
    ScriptedLLM,
    cooperator,
    letter,
)

from router.budget import Budget
from router.controller import PriceController
from router.ledger import FractionOfTraffic, Limit, MemoryLedger, TokensPerWindow
from router.policy import Calibration, Policy
from server.completion import Piece
from server.engine import Cooperation
from server.exchange import EXCHANGE, Exchange, Report
from server.gate_processor import TERMS
from server.metrics import counted
from server.shared_budgets import SharedBudgets
from server.teacher.breaker import Breaker
from server.teacher.client import Ask
from server.teacher.errors import TeacherError
from server.tenants import Tenant, hash_key
from server.vllm_api import (
    CompletionOutput,
    GracefulHTTPError,
    Logprob,
    RequestOutput,
    SamplingParams,
    VLLMValidationError,
)

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
    """Writes a token per piece; fails or hangs at some place, ends at one."""

    breaker: Breaker = field(default_factory=lambda: Breaker(1, 60.0))
    max_model_len: int | None = None
    ends_at: int | None = None
    fails_at: int | None = None
    hangs_at: int | None = None
    writes_on: bool = False
    """Whether it writes a token, and more, although the call is cancelled while it hangs."""
    refuses: str | None = None
    calls: list[Call] = field(default_factory=list)
    asks: list[Ask] = field(default_factory=list)
    biases: list[dict[int, float] | None] = field(default_factory=list)
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
        self.biases.append(params.logit_bias)
        try:
            for written in range(tokens):
                await asyncio.sleep(0)
                yield await self._piece(
                    len(prompt_ids) - len(PROMPT_IDS) + written, written + 1 == tokens, params
                )
                if self.ends_at == len(prompt_ids) - len(PROMPT_IDS) + written:
                    return
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
        token = EOS if ends else letter(place, "A")
        logprobs = None if params.logprobs is None else [{token: Logprob(-0.5)}]
        return Piece([token], logprobs, "stop" if ends else "length" if full else None)


class Engine:
    """What is tested, with the segments that reached its scripted vLLM and the last request's exchange."""

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
        """Teacher tokens on the books of every choice."""
        return [purse.bucket.spent for purses in self.exchange.purses.values() for purse in purses]


@pytest.fixture
def pair(tokenizer):
    """Builds an engine and its teacher: ``pair(ask_at={2}, fails_at=3, span_tokens=4)``."""

    def pair(
        *,
        ask_at: Collection[int] = (),
        ends_at: int | None = None,
        span_tokens: int = 2,
        ask_tokens: int | None = None,
        default: float = 0.5,
        models: dict[str, Any] | None = None,
        on_teacher_error: str = "degrade",
        shared: SharedBudgets | None = None,
        student: dict[str, Any] | None = None,
        **teacher: Any,
    ) -> tuple[Engine, ScriptedTeacher]:
        cooperation = Cooperation(
            teacher=ScriptedTeacher(**teacher),
            policy=Policy(CALIBRATION, expected_tokens=20),
            reserved=RESERVED,
            span_tokens=span_tokens,
            ask_tokens=ask_tokens,
            default_budget=Budget(fraction=default),
            models={name: Budget.model_validate(value) for name, value in (models or {}).items()},
            shared=shared or SharedBudgets(MemoryLedger(), PriceController(CALIBRATION, span_tokens)),
            on_teacher_error=on_teacher_error,
        )
        engine = Engine(ScriptedLLM(tokenizer, ask_at, ends_at), cooperation, **(student or {}))
        return engine, cooperation.teacher

    return pair


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
        """Of DELTA outputs."""
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
    for name in ("searches", "writes_nothing", "names", "tenant", "model", "budget_name"):
        setattr(exchange, name, params.pop(name, getattr(exchange, name)))
    options = params.pop("options", {})
    sampling = SamplingParams(**{"max_tokens": 8, "output_kind": DELTA} | params)
    return engine.generate(sampling, exchange, **options), exchange


async def write(engine: Engine, budget: object = None, **params: Any) -> Result:
    outputs, exchange = start(engine, budget, **params)
    return Result([output async for output in outputs], exchange)


def count(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def spent(engine: Engine) -> tuple[int, int]:
    """Teacher tokens and calls on the books of the only choice."""
    ((purse,),) = engine.exchange.purses.values()
    return purse.bucket.spent, purse.bucket.calls


# Who writes what


async def test_two_models_write_one_completion(pair):
    engine, teacher = pair(ask_at={2, 6})
    result = await write(engine, 0.5, max_tokens=10)
    assert result.text() == "abCDefGHij"
    assert (result.report.spans, result.report.tokens, result.report.calls) == ([[2, 4], [6, 8]], 4, 2)
    assert result.report.completion_tokens == 10
    assert result.report.denied == {}
    assert not result.report.degraded
    assert result.last.finish_reason == "length"
    assert spent(engine) == (4, 2)
    assert [call.tokens for call in teacher.calls] == [2, 2]


async def test_every_prefix_is_prompt_and_completion_without_a_trace_of_asking(pair):
    engine, teacher = pair(ask_at={2, 6})
    await write(engine, 0.5, max_tokens=10)
    assert [bytes(segment.prefix) for segment in engine.segments] == [b"Hi", b"HiabCD", b"HiabCDefGH"]
    assert [bytes(call.prefix) for call in teacher.calls] == [b"Hiab", b"HiabCDef"]


async def test_a_span_may_follow_a_span(pair):
    engine, _ = pair(ask_at={1, 3})
    result = await write(engine, 0.5, max_tokens=6)
    assert result.text() == "aBCDEf"
    assert result.report.spans == [[1, 3], [3, 5]]


async def test_a_span_may_be_asked_for_token_by_token(pair):
    """The gate decides behind every token of the teacher whether to ask for another."""
    engine, teacher = pair(ask_at={2, 3, 4}, span_tokens=4, ask_tokens=1)
    result = await write(engine, 0.5, max_tokens=8)
    assert result.text() == "abCDEfgh"
    assert [call.tokens for call in teacher.calls] == [1, 1, 1]
    assert result.report.spans == [[2, 3], [3, 4], [4, 5]]
    assert spent(engine) == (3, 3)


async def test_a_span_may_come_first(pair):
    engine, _ = pair(ask_at={0})
    assert (await write(engine, 0.5, max_tokens=4)).text() == "ABcd"


async def test_a_span_ends_at_max_tokens(pair):
    engine, teacher = pair(ask_at={3}, span_tokens=4)
    result = await write(engine, 0.5, max_tokens=5)
    assert result.text() == "abcDE"
    assert teacher.calls[0].tokens == 2
    assert (result.last.finish_reason, result.outputs[-1].finished) == ("length", True)


async def test_every_output_says_who_wrote_it(pair):
    engine, _ = pair(ask_at={2})
    outputs, exchange = start(engine, 0.5, max_tokens=5)
    seen = [(bytes(o.outputs[0].token_ids).decode(), exchange.latest.source) async for o in outputs]
    assert [entry for entry in seen if entry[0]] == [
        ("a", "student"),
        ("b", "student"),
        ("C", "teacher"),
        ("D", "teacher"),
        ("e", "student"),
    ]
    assert exchange.finished


async def test_the_student_may_end_it(pair):
    engine, _ = pair(ask_at={2}, ends_at=5)
    result = await write(engine, 0.5)
    assert (result.text(), result.ids()[-1]) == ("abCDe", EOS)
    assert result.last.finish_reason == "stop"


async def test_the_teacher_may_end_it(pair):
    engine, teacher = pair(ask_at={2}, ends_at=9, span_tokens=4)
    teacher.ends_at = 3
    result = await write(engine, 0.5, max_tokens=20)
    assert (result.text(), result.ids()[-1]) == ("abC", EOS)
    assert result.last.finish_reason == "stop"
    assert result.report.spans == [[2, 4]]
    assert spent(engine) == (2, 1)  # of the four that were reserved
    assert len(engine.segments) == 1


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
    assert result.report.denied == {}  # it never came to a refusal


async def test_tokens_that_cover_the_plan_are_one_call(pair):
    engine, teacher = pair(ask_at=range(100))
    result = await write(engine, {"tokens": 50}, max_tokens=60)  # of 20 tokens that are expected
    assert [call.tokens for call in teacher.calls] == [50]
    assert (result.report.tokens, result.report.calls) == (50, 1)
    assert result.report.spans == [[0, 50]]


async def test_the_terms_travel_with_each_segment(pair):
    engine, _ = pair(ask_at={0, 4})
    await write(engine, 0.25, max_tokens=20, extra_args={"caller": "x"})
    # behind the first span: 2 + 2 <= 0.25 * (length + 2) + 2 from a length of 6, four tokens later
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


# A teacher that fails


async def test_a_lost_teacher_leaves_the_rest_to_the_student(pair):
    engine, teacher = pair(ask_at={2, 6}, fails_at=2)
    result = await write(engine, 0.5, max_tokens=8)
    assert result.text() == "abcdefgh"
    assert result.report.degraded
    assert result.report.denied == {"timeout": 1}
    assert (result.report.calls, result.report.tokens) == (1, 0)
    assert result.report.as_dict()["spans"] == []
    assert spent(engine) == (0, 1)
    assert engine.segments[-1].not_before == 32
    assert len(teacher.calls) == 1


async def test_what_a_teacher_wrote_before_it_was_lost_stays(pair):
    engine, teacher = pair(ask_at={2}, fails_at=4, span_tokens=4)
    result = await write(engine, 0.5, max_tokens=8)
    assert result.text() == "abCDefgh"
    assert (result.report.spans, result.report.tokens) == ([[2, 4]], 2)
    assert spent(engine) == (2, 1)
    assert teacher.calls[0].closed
    assert bytes(engine.segments[-1].prefix) == b"HiabCD"


async def test_a_lost_teacher_can_be_an_error(pair):
    engine, _ = pair(ask_at={2}, fails_at=3, on_teacher_error="error")
    failed = count("wheels_requests_total", outcome="error")
    outputs, exchange = start(engine, 0.5)
    written = [(await anext(outputs)).outputs[0].token_ids for _ in range(3)]
    assert written == [[ord("a")], [ord("b")], [ord("C")]]
    with pytest.raises(GracefulHTTPError, match="The teacher did not answer in time") as error:
        await anext(outputs)
    assert error.value.http_status == HTTPStatus.BAD_GATEWAY
    assert spent(engine) == (1, 1)
    assert not exchange.finished
    assert count("wheels_requests_total", outcome="error") - failed == 1


async def test_an_open_breaker_forbids_asking(pair):
    engine, teacher = pair(ask_at={2})
    teacher.breaker.failed()
    result = await write(engine, 0.5)
    assert result.text() == "abcdefgh"
    assert (result.report.degraded, result.report.denied) == (True, {"breaker": 1})
    assert teacher.calls == []
    assert [segment.not_before for segment in engine.segments] == [32]


async def test_a_lost_teacher_is_asked_again_later(pair):
    engine, _ = pair(ask_at={2, 20, 40}, fails_at=2)
    result = await write(engine, 0.5, max_tokens=50)
    assert result.report.spans == [[2, 2], [40, 42]], "not at 20: it has to pause"
    assert (result.report.denied, result.report.degraded) == ({"timeout": 1}, True)
    assert spent(engine) == (2, 2)


@pytest.mark.parametrize("budget", [0.9, 1])
async def test_a_teacher_that_stays_away_is_asked_less_and_less(pair, budget):
    """At 0, 32 and 96 tokens; then 128 later, beyond the end."""
    engine, _ = pair(ask_at=range(1000), refuses="unreachable")
    result = await write(engine, budget, max_tokens=198)
    assert result.report.denied == {"unreachable": 3}
    assert len(result.ids()) == 198
    assert [len(segment.prefix) - len(PROMPT_IDS) for segment in engine.segments][-2:] == [32, 96]


async def test_a_teacher_that_came_back_has_lost_nothing(pair):
    engine, teacher = pair(ask_at=range(1000), refuses="unreachable")
    outputs, exchange = start(engine, {"calls": 1}, max_tokens=198)
    written = 0
    async for output in outputs:
        written += len(output.outputs[0].token_ids)
        teacher.refuses = None if written >= 20 else teacher.refuses
    (report,) = exchange.reports
    assert (report.spans, report.denied) == ([[32, 34]], {"unreachable": 1})


async def test_what_a_teacher_refuses_once_it_is_not_asked_again(pair):
    engine, teacher = pair(ask_at=range(1000))

    async def refuse(*_: Any, **__: Any) -> AsyncIterator[Piece]:
        raise TeacherError("status", "too long", refused=True)
        yield

    teacher.write = refuse
    result = await write(engine, 0.9, max_tokens=100)
    assert (result.report.denied, result.report.calls) == ({"status": 1}, 1)
    assert engine.segments[-1].price == INF


async def test_a_breaker_that_opens_meanwhile_refuses_the_span(pair):
    engine, teacher = pair(ask_at={2})
    outputs, exchange = start(engine, 0.5)
    text = ""
    async for output in outputs:
        teacher.breaker.failed()  # by another request
        text += bytes(output.outputs[0].token_ids).decode()
    assert text == "abcdefgh"
    assert exchange.total().denied == {"breaker": 1}
    assert exchange.total().degraded
    assert spent(engine) == (0, 0)
    assert teacher.calls == []


@pytest.mark.parametrize(("context", "text"), [(4, "abcdefgh"), (5, "abCdefgh"), (6, "abCDefgh")])
async def test_the_teachers_context_bounds_a_span(pair, context, text):
    engine, _ = pair(ask_at={2}, max_model_len=context)  # two tokens of prompt, two of the student
    result = await write(engine, {"calls": 1})
    assert result.text() == text
    assert result.report.denied == ({"context": 1} if context == 4 else {})
    assert not result.report.degraded


# Clients that leave


async def test_leaving_amid_a_span_closes_the_call_and_settles(pair):
    engine, teacher = pair(ask_at={2}, span_tokens=4)
    aborted = count("wheels_requests_total", outcome="aborted")
    outputs, exchange = start(engine, 0.5)
    text = ""
    async for output in outputs:
        text += bytes(output.outputs[0].token_ids).decode()
        if text.endswith("D"):
            break
    assert spent(engine) == (4, 1)  # reserved
    await outputs.aclose()
    assert spent(engine) == (2, 1)
    assert teacher.calls[0].closed
    assert not exchange.finished
    assert count("wheels_requests_total", outcome="aborted") - aborted == 1


async def test_leaving_amid_a_segment_closes_it(pair):
    engine, teacher = pair()
    outputs, _ = start(engine, 0.5)
    await anext(outputs)
    await outputs.aclose()
    assert engine.segments[0].closed
    assert teacher.calls == []


async def test_leaving_a_plain_request_closes_it(pair):
    engine, _ = pair()
    outputs, _ = start(engine, 0)
    await anext(outputs)
    await outputs.aclose()
    assert engine.segments[0].closed


async def test_cancelling_while_the_teacher_hangs_closes_the_call_and_settles(pair):
    engine, teacher = pair(ask_at={2}, hangs_at=3, span_tokens=4)
    task = asyncio.create_task(write(engine, 0.5))
    await teacher.hanging.acquire()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert teacher.calls[0].closed
    assert spent(engine) == (1, 1)


async def test_leaving_two_choices_closes_both(pair):
    engine, teacher = pair(ask_at={2}, hangs_at=3, span_tokens=4)
    task = asyncio.create_task(write(engine, 0.5, n=2))
    await teacher.hanging.acquire()
    await teacher.hanging.acquire()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    for _ in range(10):  # the iterators of both choices end in tasks of their own
        await asyncio.sleep(0)
    assert [call.closed for call in teacher.calls] == [True, True]
    assert engine.spent == [1, 1]


# Stop strings, minimum lengths, seeds


@pytest.mark.parametrize(
    ("stop", "shown", "kept"), [("bC", "a", "abC"), ("CD", "ab", "abCD"), ("De", "abC", "abCDe")]
)
@pytest.mark.parametrize("kind", [DELTA, FINAL_ONLY])
async def test_a_stop_string_ends_the_completion_wherever_it_is(pair, stop, shown, kept, kind):
    engine, teacher = pair(ask_at={2}, span_tokens=4 if stop == "CD" else 2)
    result = await write(engine, 0.5, stop=[stop], output_kind=kind)
    assert "".join(new.text for new in result.choice()) == shown
    assert result.text() == kept
    assert (result.last.finish_reason, result.last.stop_reason) == ("stop", stop)
    assert [output.finished for output in result.outputs].count(True) == 1
    assert all(call.closed for call in teacher.calls)
    assert all(segment.closed for segment in engine.segments)
    assert result.report.completion_tokens == len(kept)
    assert result.report.tokens == sum(character.isupper() for character in kept)


async def test_min_tokens_hold_the_ending_back_but_not_the_question(pair):
    engine, teacher = pair(ask_at={1}, ends_at=4, span_tokens=1)
    result = await write(engine, 0.5, min_tokens=6, max_tokens=9)
    assert result.text() == "aBcdefghi"
    assert [call.min_tokens for call in teacher.calls] == [5]  # one was written
    assert [segment.params.min_tokens for segment in engine.segments] == [6, 4]
    assert [segment.params.max_tokens for segment in engine.segments] == [9, 7]


async def test_a_frequency_penalty_counts_the_whole_completion(pair):
    """What vLLM does not see any more comes as a bias, beside the caller's own."""
    engine, teacher = pair(ask_at={2})
    bias = {ord("a"): 2.0}
    result = await write(engine, {"tokens": 2}, max_tokens=6, frequency_penalty=0.5, logit_bias=bias)
    assert result.text() == "abCDef"
    assert [segment.params.frequency_penalty for segment in engine.segments] == [0.5] * 2
    a, b, c, d = b"abCD"
    first, second = (segment.params.logit_bias for segment in engine.segments)
    assert (first, second) == ({a: 2.0}, {a: 1.5, b: -0.5, c: -0.5, d: -0.5})
    assert teacher.biases == [{a: 1.5, b: -0.5}]
    assert bias == {a: 2.0}


async def test_min_tokens_are_no_length_of_their_own(pair):
    engine, _ = pair(ends_at=4)
    result = await write(engine, 0.5, min_tokens=2, max_tokens=9)
    assert (result.text(), result.last.finish_reason) == ("abcd", "stop")


async def test_every_segment_has_a_seed_of_its_own(pair):
    engine, teacher = pair(ask_at={2, 6})
    await write(engine, 0.5, max_tokens=10, seed=7)
    seeds = [s.params.seed for s in engine.segments] + [call.seed for call in teacher.calls]
    assert seeds[0] == 7
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


async def test_the_same_seed_gives_the_same_seeds(pair):
    async def seeds() -> list[int]:
        engine, _ = pair(ask_at={2})
        await write(engine, 0.5, seed=2**63 - 1)
        return [segment.params.seed for segment in engine.segments]

    assert await seeds() == await seeds()


async def test_without_a_seed_there_is_none(pair):
    engine, teacher = pair(ask_at={2})
    await write(engine, 0.5)
    assert [s.params.seed for s in engine.segments] == [None, None]
    assert [call.seed for call in teacher.calls] == [None]


# What the student's engine is asked


async def test_the_escalation_token_stops_a_segment_and_is_no_stop_of_the_callers(pair):
    engine, _ = pair(ask_at={2})
    params = SamplingParams(max_tokens=8, output_kind=DELTA, stop_token_ids=[5], stop=["zz"])
    outputs = engine.generate(params, Exchange())
    assert [output async for output in outputs]
    assert all(s.params.stop_token_ids == [5, RESERVED.escalation] for s in engine.segments)
    assert all(s.params.stop == [] and s.params.detokenize is False for s in engine.segments)
    assert (params.stop_token_ids, params.stop, params.extra_args) == ([5], ["zz"], None)


async def test_allowed_tokens_leave_the_gate_its_rows(pair):
    engine, _ = pair()
    await write(engine, 0.5, allowed_token_ids=[97, 98])
    assert engine.segments[0].params.allowed_token_ids == [97, 98, 260, 261, 262, 263]


async def test_ids_and_options_of_segments(pair):
    engine, teacher = pair(ask_at={2, 6})
    await write(engine, 0.5, max_tokens=10, options={"trace_headers": {}})
    ids = [segment.request_id for segment in engine.segments] + [call.request_id for call in teacher.calls]
    assert len(set(ids)) == 5
    assert all(request_id.startswith("r-") for request_id in ids)
    assert all(segment.options["trace_headers"] == {} for segment in engine.segments)


async def test_continuations_go_first(pair):
    """Smaller numbers do: before all new requests of the same priority, behind those of a better one."""
    engine, _ = pair(ask_at={2, 6})
    engine.cooperator.cooperation = replace(engine.cooperator.cooperation, client_priority=True)
    seen = []
    for priority in (-(2**63), -1, 0, 1, 2**63 - 1):
        engine.segments.clear()
        await write(engine, 0.5, max_tokens=10, options={"priority": priority})
        first, *others = [segment.options["priority"] for segment in engine.segments]
        assert others == [first - 1] * 2
        engine.segments.clear()
        await write(engine, 0, options={"priority": priority})
        assert engine.segments[0].options["priority"] == first
        seen += [first - 1, first]
    assert seen == sorted(set(seen))
    assert seen[0] >= -(2**63)
    assert seen[-1] < 2**63


async def test_a_priority_is_not_for_every_client_to_choose(pair):
    engine, _ = pair()
    with pytest.raises(VLLMValidationError, match="--scheduling-policy priority") as error:
        await write(engine, 0, options={"priority": -1})
    assert error.value.parameter == "priority"


async def test_max_tokens_are_what_is_left(pair):
    engine, _ = pair(ask_at={2})
    await write(engine, 0.5, max_tokens=10)
    assert [segment.params.max_tokens for segment in engine.segments] == [10, 6]


@pytest.mark.parametrize("wanted", [None, 500])
async def test_the_context_bounds_a_completion(pair, wanted):
    engine, _ = pair(ask_at={2})
    result = await write(engine, 0.5, max_tokens=wanted)
    assert len(result.ids()) == 200 - len(PROMPT_IDS)
    assert result.last.finish_reason == "length"


# What the caller gets


@pytest.mark.parametrize("kind", [CUMULATIVE, FINAL_ONLY])
async def test_outputs_come_in_the_kind_that_was_asked_for(pair, kind):
    engine, _ = pair(ask_at={2})
    result = await write(engine, 0.5, max_tokens=6, output_kind=kind)
    assert (result.last.text, bytes(result.last.token_ids)) == ("abCDef", b"abCDef")
    assert [output.finished for output in result.outputs].count(True) == 1
    assert result.outputs[-1].finished
    if kind == FINAL_ONLY:
        assert len(result.outputs) == 1


async def test_outputs_name_the_request_as_the_caller_did(pair):
    engine, _ = pair(ask_at={2})
    result = await write(engine, 0.5)
    for output in result.outputs:
        assert (output.request_id, output.prompt, output.prompt_token_ids) == ("r", "Hi", PROMPT_IDS)
        assert output.num_cached_tokens == 1  # of the first segment: half of its prefix


async def test_log_probabilities_are_of_whoever_wrote_the_token(pair):
    engine, _ = pair(ask_at={2})
    result = await write(engine, 0.5, max_tokens=6, logprobs=0)
    entries = [entry for new in result.choice() for entry in new.logprobs]
    assert [entry[token].logprob for entry, token in zip(entries, result.ids(), strict=True)] == [
        -1.0,
        -1.0,
        -0.5,
        -0.5,
        -1.0,
        -1.0,
    ]
    assert result.last.cumulative_logprob == -5.0


async def test_no_output_is_empty(pair):
    engine, _ = pair(ask_at={2, 6})
    result = await write(engine, 0.5, max_tokens=10)
    assert all(output.outputs[0].token_ids for output in result.outputs)


# A teacher that writes over the end


def whole_spans(teacher: ScriptedTeacher, text: bytes, ends: int | None = None) -> None:
    """Let it write each span in one piece, of this text; some servers know nothing of our end tokens."""

    async def write(slot: Any, ask: Ask, **_: Any) -> AsyncIterator[Piece]:
        ids = [EOS if place == ends else token for place, token in enumerate(text[: ask.tokens])]
        yield Piece(ids, [{token: Logprob(-0.5)} for token in ids], "length")

    teacher.write = write


@pytest.mark.parametrize("kind", [DELTA, FINAL_ONLY])
async def test_the_students_end_token_ends_a_span(pair, kind):
    shared = shared_by_all(tokens(100))
    engine, teacher = pair(ask_at={2}, span_tokens=8, shared=shared)
    whole_spans(teacher, b"CDEFGHIJ", ends=3)
    result = await write(engine, 0.9, max_tokens=20, output_kind=kind, logprobs=0)
    assert (result.text(), result.ids()[-1]) == ("abCDE", EOS)
    assert (result.last.finish_reason, result.last.stop_reason) == ("stop", None)
    assert result.report.spans == [[2, 6]]
    assert len(engine.segments) == 1
    assert spent(engine) == (4, 1)
    assert await on_the_books(shared) == (4, 0, 2)


async def test_a_callers_stop_token_ends_a_span(pair):
    engine, teacher = pair(ask_at={2}, span_tokens=8)
    whole_spans(teacher, b"CDEFGHIJ")
    result = await write(engine, 0.9, max_tokens=20, stop_token_ids=[ord("E")])
    assert (result.text(), result.last.stop_reason) == ("abCDE", ord("E"))


async def test_who_ignores_ends_gets_more(pair):
    engine, teacher = pair(ask_at={2}, span_tokens=8)
    whole_spans(teacher, b"CDEFGHIJ", ends=3)
    result = await write(engine, {"calls": 1}, max_tokens=12, ignore_eos=True)
    assert len(result.ids()) == 12
    assert result.last.finish_reason == "length"


@pytest.mark.parametrize("kind", [DELTA, FINAL_ONLY])
async def test_what_comes_after_a_stop_string_is_not_paid(pair, kind):
    """The books, the report, the usage and the metrics say the same."""
    shared = shared_by_all(tokens(100))
    engine, teacher = pair(ask_at={2}, span_tokens=8, shared=shared)
    whole_spans(teacher, b"CDEFGHIJ")
    before = count("wheels_completion_tokens_total", source="teacher")
    result = await write(engine, 0.9, max_tokens=20, stop=["DE"], output_kind=kind)
    assert result.text() == "abCDE"
    assert (result.report.tokens, result.report.completion_tokens) == (3, 5)
    assert spent(engine) == (3, 1)
    assert await on_the_books(shared) == (3, 0, 2)
    assert count("wheels_completion_tokens_total", source="teacher") - before == 3


# A request for which the engine is called several times


@pytest.mark.parametrize("budget", [0.25, {"tokens": 5}, {"calls": 2}, {"fraction": 0.5, "tokens": 7}])
async def test_calls_one_after_the_other_share_the_requests_budget(pair, budget):
    """As a response does whose tools the gateway runs."""
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


# Clients that read slowly


async def test_a_client_that_does_not_read_holds_nothing(pair):
    """All is written, paid and given back while it has read one token."""
    shared = shared_by_all(tokens(100))
    engine, teacher = pair(ask_at={2}, span_tokens=4, shared=shared)
    outputs, exchange = start(engine, 0.9, max_tokens=8)
    first = await anext(outputs)
    for _ in range(100):  # the models write on
        await asyncio.sleep(0)
    assert [segment.closed for segment in engine.segments] == [True, True]
    assert await on_the_books(shared) == (4, 0, 4)
    assert teacher.released == 1
    rest = await collect(outputs)
    read = b"".join(bytes(output.outputs[0].token_ids) for output in (first, *rest))
    assert read == b"abCDEFgh"
    assert exchange.finished


async def test_what_is_written_while_a_client_leaves_is_counted_as_it_is_charged(pair):
    shared = shared_by_all(tokens(100))
    engine, teacher = pair(ask_at={2}, span_tokens=4, shared=shared, hangs_at=3, writes_on=True)
    before = count("wheels_completion_tokens_total", source="teacher")
    outputs, _ = start(engine, 0.9, max_tokens=8)
    await anext(outputs)
    await teacher.hanging.acquire()
    await outputs.aclose()
    spent, reserved, _ = await on_the_books(shared)
    assert (spent, reserved) == (4, 0)
    assert count("wheels_completion_tokens_total", source="teacher") - before == spent


async def test_who_wrote_what_reaches_a_slow_reader_too(pair):
    engine, _ = pair(ask_at={2})
    outputs, exchange = start(engine, 0.5, max_tokens=6)
    seen = []
    async for output in outputs:
        for _ in range(20):  # both models are ahead
            await asyncio.sleep(0)
        seen.append((bytes(output.outputs[0].token_ids).decode(), exchange.latest.source))
    assert [source for text, source in seen] == [
        "teacher" if text.isupper() else "student" for text, _ in seen
    ]


# Several choices


async def test_choices_are_written_apart(pair):
    engine, teacher = pair(ask_at={2})
    result = await write(engine, 0.5, n=3, max_tokens=6, seed=7)
    assert [result.text(index) for index in range(3)] == ["abCDef"] * 3
    assert [report.spans for report in result.exchange.reports] == [[[2, 4]]] * 3
    assert len(teacher.calls) == 3
    first = [s.params.seed for s in engine.segments if bytes(s.prefix) == b"Hi"]
    assert sorted(first) == [7, 8, 9]
    assert all(segment.params.n == 1 for segment in engine.segments)
    assert [output.finished for output in result.outputs] == [False] * (len(result.outputs) - 1) + [True]


async def test_final_choices_come_together_in_order(pair):
    engine, _ = pair(ask_at={2})
    result = await write(engine, 0.5, n=3, max_tokens=6, output_kind=FINAL_ONLY)
    (output,) = result.outputs
    assert output.finished
    assert [(new.index, new.text) for new in output.outputs] == [(i, "abCDef") for i in range(3)]


async def test_every_choice_has_the_whole_budget(pair):
    engine, _ = pair(ask_at=range(100))
    result = await write(engine, {"tokens": 2}, n=2, max_tokens=5)
    assert [report.tokens for report in result.exchange.reports] == [2, 2]


# Copies of the student


@pytest.mark.parametrize(("ranks", "expected"), [(1, {None}), (4, set(range(4)))])
async def test_all_segments_of_a_prompt_go_to_the_same_copy(pair, ranks, expected):
    engine, _ = pair(ask_at={2, 6}, student={"ranks": ranks})
    used = set()
    for last in range(40):
        prompt = {**PROMPT, "prompt_token_ids": [72, last]}
        engine.segments.clear()
        params = SamplingParams(max_tokens=10, output_kind=DELTA, n=2)
        await collect(engine.generate(params, Exchange(Budget(fraction=0.5)), prompt))
        (rank,) = {segment.options["data_parallel_rank"] for segment in engine.segments}
        used.add(rank)
    assert used == expected


async def test_a_copy_that_the_caller_names_is_the_one(pair):
    engine, _ = pair(ask_at={2}, student={"ranks": 4})
    await write(engine, 0.5, options={"data_parallel_rank": 3})
    assert [segment.options["data_parallel_rank"] for segment in engine.segments] == [3, 3]


# What the engine cannot take

MANY = 1025 - RESERVED.count


@pytest.mark.parametrize("budget", [0, 0.5, 1])
@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("logit_bias", dict.fromkeys(range(300, 300 + MANY), 1.0)),
        ("allowed_token_ids", list(range(300, 300 + MANY))),
        ("bad_words", ["x" * 600, "y" * 600]),
        ("stop", ["a\ud800"]),
        ("bad_words", ["\udfff"]),
    ],
)
async def test_what_would_end_the_engine_is_refused_at_every_budget(pair, budget, parameter, value):
    engine, teacher = pair(ask_at={2})
    with pytest.raises(VLLMValidationError) as error:
        start(engine, budget, **{parameter: value})
    assert error.value.parameter == parameter
    assert (engine.segments, teacher.calls) == ([], [])


@pytest.mark.parametrize("budget", [0, 0.5])
async def test_as_many_as_the_engine_takes_are_taken(pair, budget):
    engine, _ = pair(ask_at={2})
    ids = range(300, 299 + MANY)
    await write(engine, budget, logit_bias=dict.fromkeys(ids, 1.0))
    await write(engine, budget, allowed_token_ids=list(ids))
    await write(engine, budget, stop_token_ids=list(range(300, 500)))
    assert max(len(segment.params.allowed_token_ids or ()) for segment in engine.segments) <= 1024


@pytest.mark.parametrize("budget", [0, 0.5])
async def test_stop_tokens_are_counted_where_they_are_masked(pair, budget):
    engine, _ = pair(ask_at={2})
    stop_token_ids = list(range(300, 300 + 113))
    with pytest.raises(VLLMValidationError) as error:
        start(engine, budget, stop_token_ids=stop_token_ids, min_tokens=1)
    assert error.value.parameter == "stop_token_ids"
    await write(engine, budget, stop_token_ids=stop_token_ids[:-1], min_tokens=1)


@pytest.mark.parametrize("budget", [0.9, 1, {"calls": 3}])
@pytest.mark.parametrize("others", [1000, 1015, 1020])
async def test_a_frequency_penalty_never_has_more_biases_than_the_engine_takes(pair, budget, others):
    """Tokens that are written become biases; with no room for more, the student ends the completion alone."""
    engine, teacher = pair(ask_at=range(0, 1000, 5), span_tokens=3)
    bias = dict.fromkeys(range(300, 300 + others), 0.5)
    result = await write(engine, budget, max_tokens=150, frequency_penalty=0.5, logit_bias=bias)
    assert len(result.ids()) == 150
    sent = [segment.params.logit_bias for segment in engine.segments] + teacher.biases
    assert max(map(len, sent)) <= 1024
    ids = result.ids()
    for segment in engine.segments:
        written = segment.prefix[len(PROMPT_IDS) :]
        assert written == ids[: len(written)]
        assert all(segment.params.logit_bias[i] == -0.5 * written.count(i) for i in written)
    if others == 1020:
        assert result.report.denied == {"penalty": 1}
        assert not result.report.degraded


@pytest.mark.parametrize("drafts", [False, True])
async def test_a_frequency_penalty_with_drafts_is_the_students_alone(pair, drafts):
    engine, teacher = pair(ask_at={2}, student={"speculative": drafts})
    if drafts:
        with pytest.raises(VLLMValidationError) as error:
            start(engine, 0.5, frequency_penalty=0.5)
        assert error.value.parameter == "frequency_penalty"
    await write(engine, frequency_penalty=0.5)
    assert len(teacher.calls) == (not drafts)
    assert [segment.params.logit_bias for segment in engine.segments][:1] == [None if drafts else {}]


# What is refused


async def test_a_parameter_that_two_models_cannot_honour_is_refused(pair):
    engine, _ = pair()
    with pytest.raises(VLLMValidationError, match="teacher_budget above 0") as error:
        start(engine, 0.5, presence_penalty=1.0)
    assert error.value.parameter == "presence_penalty"
    with pytest.raises(VLLMValidationError) as error:
        start(engine, 0.5, unsupported="use_beam_search")
    assert error.value.parameter == "use_beam_search"
    assert engine.segments == []


async def test_a_refusal_names_the_parameter_as_it_was_sent(pair):
    engine, _ = pair()
    with pytest.raises(VLLMValidationError, match="echo cannot be honoured") as error:
        start(engine, 0.5, prompt_logprobs=1, names={"prompt_logprobs": "echo"})
    assert error.value.parameter == "echo"


@pytest.mark.parametrize("budget", [None, 0, 0.5, 1])
async def test_a_request_that_writes_nothing_spends_nothing(pair, budget):
    """The prompt's log-probabilities alone: vLLM writes a token for them, and throws it away."""
    engine, teacher = pair(ask_at={0}, default=0.5)
    result = await write(engine, budget, prompt_logprobs=1, max_tokens=1, writes_nothing=True)
    assert result.report.tokens == 0
    assert teacher.calls == []


@pytest.mark.parametrize("budget", [0.5, 1])
async def test_what_vllm_refuses_of_one_model_is_refused_of_two(pair, budget):
    """Segments have other parameters: to an empty choice of tokens they add the reserved rows."""
    engine, teacher = pair()
    for parameters in ({"allowed_token_ids": []}, {"logprobs": 21}, {"logit_bias": {VOCABULARY: 1.0}}):
        with pytest.raises(VLLMValidationError) as error:
            start(engine, budget, **parameters)
        assert error.value.parameter in parameters
    assert (engine.segments, teacher.calls) == ([], [])


@pytest.mark.parametrize("budget", [None, 0])
async def test_without_a_budget_of_its_own_such_a_request_is_the_students_alone(pair, budget):
    engine, teacher = pair(ask_at={2})
    result = await write(engine, budget, presence_penalty=1.0)
    assert result.text() == "abcdefgh"
    assert engine.segments[0].params.presence_penalty == 1.0
    assert teacher.calls == []


@pytest.mark.parametrize("budget", [0, 0.5, 1])
async def test_reserved_rows_and_the_price_are_not_the_clients(pair, budget):
    engine, _ = pair()
    with pytest.raises(VLLMValidationError, match="reserved"):
        start(engine, budget, stop_token_ids=[RESERVED.escalation])
    for term in TERMS:
        with pytest.raises(VLLMValidationError, match="the terms of asking are the router's"):
            start(engine, budget, extra_args={term: 0})


# Metrics


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


async def test_what_the_engine_refuses_in_mid_answer_is_an_error(pair):
    """It is one request more, and its tokens were written."""
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
def test_what_the_engine_refuses_is_no_error_of_ours(error):
    before = count("wheels_requests_total", outcome="error")
    with pytest.raises(type(error)), counted([Report()], budgeted=False, refusal=VLLMValidationError):
        raise error
    assert count("wheels_requests_total", outcome="error") - before == isinstance(error, RuntimeError)


async def test_the_steps_of_a_beam_search_are_no_completions(pair):
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
        engine.generate(SamplingParams(presence_penalty=1.0), exchange)
    assert exchange.failure is error.value


# A place at the teacher


async def test_the_same_prompt_goes_to_the_same_replica(pair):
    engine, teacher = pair(ask_at={2, 6})
    await write(engine, 0.5, max_tokens=10, n=2)
    assert len(teacher.admitted) == 4
    assert len(set(teacher.admitted)) == 1
    assert teacher.released == 4


async def test_a_saturated_teacher_is_asked_again_later(pair):
    engine, teacher = pair(ask_at={2, 20, 40}, refuses="saturated")
    outputs, exchange = start(engine, 0.5, max_tokens=50)
    text = ""
    async for output in outputs:
        text += bytes(output.outputs[0].token_ids).decode()
        if len(text) == 30:
            teacher.refuses = None
    (report,) = exchange.reports
    assert report.spans == [[40, 42]], "not at 20: PAUSE_TOKENS have to pass"
    assert (report.denied, report.degraded, report.calls) == ({"saturated": 1}, False, 1)
    assert spent(engine) == (2, 1)


async def test_a_refused_span_is_on_nobodys_books(pair):
    shared = shared_by_all(tokens(100))
    engine, teacher = pair(ask_at={2, 6}, refuses="breaker", shared=shared)
    result = await write(engine, {"calls": 1}, max_tokens=8)
    assert result.text() == "abcdefgh"
    assert (result.report.denied, result.report.degraded) == ({"breaker": 1}, True)
    assert (spent(engine), result.report.calls, teacher.released) == ((0, 0), 0, 0)
    assert await on_the_books(shared) == (0, 0, 8)


@pytest.mark.parametrize("limit", [0, 2])
async def test_a_refused_budget_does_not_use_up_the_breakers_trial(pair, limit):
    """Nor does a shared one: the trial is taken when all else is reserved."""
    clock = [0.0]
    engine, teacher = pair(ask_at={0}, shared=shared_by_all(tokens(limit)))
    teacher.breaker = Breaker(1, 10.0, lambda: clock[0])
    teacher.breaker.failed()
    clock[0] = 11.0
    await write(engine, {"calls": 1})
    assert teacher.breaker.open is (limit > 0)


async def test_whoever_leaves_while_waiting_for_the_teacher_gives_everything_back(pair):
    shared = shared_by_all(tokens(100))
    engine, teacher = pair(ask_at={2}, shared=shared)
    waits = asyncio.Event()

    async def admit(key: bytes) -> None:
        waits.set()
        await asyncio.Event().wait()

    teacher.admit = admit
    task = asyncio.create_task(write(engine, 0.5))
    await waits.wait()
    task.cancel()
    await asyncio.wait([task])
    assert spent(engine) == (0, 0)
    assert await on_the_books(shared) == (0, 0, 2)


@pytest.mark.parametrize("on_teacher_error", ["degrade", "error"])
async def test_a_teacher_that_goes_when_nothing_is_left_to_spend_is_not_missed(pair, on_teacher_error):
    engine, teacher = pair(ask_at={2}, on_teacher_error=on_teacher_error)
    outputs, exchange = start(engine, {"calls": 1})
    async for _ in outputs:
        if exchange.reports[0].calls:
            teacher.breaker.failed()
    (report,) = exchange.reports
    assert (report.tokens, report.degraded, report.denied) == (2, False, {})


async def test_a_teacher_that_is_down_can_be_an_error(pair):
    engine, teacher = pair(ask_at={2}, on_teacher_error="error")
    teacher.breaker.failed()
    with pytest.raises(GracefulHTTPError, match="No teacher is available"):
        await write(engine, 0.5)


# Budgets that requests share


def shared_by_all(*limits: Limit, **ledger: Any) -> SharedBudgets:
    return SharedBudgets(MemoryLedger(**ledger), PriceController(CALIBRATION, 2), limits)


def tokens(count: int) -> TokensPerWindow:
    return TokensPerWindow(tokens=count, window_seconds=3600)


async def on_the_books(shared: SharedBudgets) -> tuple[int, int, int]:
    """Spent, reserved and student's tokens under the only limit, once everything is settled."""
    await shared.aclose()
    (status,) = await shared.ledger.status(shared.everybody)
    return status.spent, status.reserved, status.student_tokens


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


async def test_what_the_teacher_did_not_write_is_given_back(pair):
    shared = shared_by_all(tokens(100))
    engine, _ = pair(ask_at={2}, span_tokens=4, shared=shared, fails_at=3)
    await write(engine, 0.9, max_tokens=8)
    assert await on_the_books(shared) == (1, 0, 7)


async def test_a_shared_limit_refuses_and_the_student_goes_on(pair):
    """The first span gets the only two tokens; then nobody asks for a while, in vain again."""
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
    """No token may come behind the lease's deadline: without shared limits there is none."""
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


async def collect(outputs: AsyncGenerator[RequestOutput, None]) -> list[RequestOutput]:
    return [output async for output in outputs]


async def test_requests_without_a_teacher_are_traffic_too(pair):
    shared = shared_by_all(tokens(100))
    engine, _ = pair(shared=shared)
    await write(engine, 0, max_tokens=8)
    assert await on_the_books(shared) == (0, 0, 8)


async def test_the_shared_price_is_the_requests_price(pair):
    """A limit of nothing makes the price infinite, once the ledger has been heard."""
    shared = shared_by_all(FractionOfTraffic(fraction=0.0, window_seconds=60))
    engine, teacher = pair(ask_at={2}, shared=shared)
    await shared.share(None).reserve(1, 1)  # refused
    await shared.update()
    result = await write(engine, 1, max_tokens=8)
    assert result.text() == "abcdefgh"
    assert teacher.calls == []
    assert result.report.denied == {}


async def test_a_tenants_maximum(pair):
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
        ("wheels-fast", {"calls": 3}, 3),  # what is sent wins
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
    with pytest.raises(VLLMValidationError, match="cannot be honoured") as error:
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


async def test_a_tenants_limit_and_everybodys(pair):
    shared = shared_by_all(tokens(100))
    engine, _ = pair(ask_at={2, 4}, span_tokens=2, shared=shared)
    tenant = Tenant(name="acme", keys=(hash_key("secret"),), limits=(tokens(3),))
    exchange = Exchange(Budget(calls=5), tenant=tenant)
    await collect(generate(engine, exchange))
    await shared.aclose()
    own, everybody = await shared.ledger.status([*tenant.scopes, *shared.everybody])
    assert (own.spent, everybody.spent) == (3, 3)
    assert exchange.total().as_dict()["tokens"] == 3
