"""Two models without a common vocabulary: a scripted student of bytes, and a teacher with merges."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from router.budget import Budget
from router.controller import PriceController
from router.ledger import MemoryLedger, TokensPerWindow
from router.policy import Calibration, Policy
from server.cooperation import Cooperation
from server.cooperator import Cooperator
from server.exchange import EXCHANGE, Exchange, Report
from server.original_prompt import OriginalPrompt
from server.shared_budgets import SharedBudgets
from server.student import StudentEngine
from server.teacher.breaker import Breaker
from server.teacher.client import Teacher
from server.teacher.pool import TeacherPool
from server.teacher.translation import Translator
from server.teacher.vocabulary import Vocabularies
from server.teacher.words import StudentWords, TeacherWords
from server.vllm_api import RequestOutput, SamplingParams
from tests.helpers.fluent_teacher import FluentTeacher, byte_level
from tests.helpers.one_teacher import one_teacher
from tests.helpers.scripted_student import DELTA, PROMPT, RESERVED, ScriptedLLM
from tests.helpers.tiny_router import byte_tokenizer

CALIBRATION = Calibration(((0.5, 1.0),))
USER = {"messages": [{"role": "user", "content": "Hi <|im_end|>"}], "add_generation_prompt": True}


@dataclass
class Written:
    """The result of one request."""

    outputs: list[RequestOutput]
    report: Report
    exchange: Exchange

    @property
    def text(self) -> str:
        return "".join(new.text for output in self.outputs for new in output.outputs)

    @property
    def ids(self) -> list[int]:
        return [token_id for output in self.outputs for new in output.outputs for token_id in new.token_ids]

    @property
    def finish(self) -> tuple[str | None, int | str | None]:
        last = self.outputs[-1].outputs[0]
        return last.finish_reason, last.stop_reason

    @property
    def by_teacher(self) -> str:
        """The text of the teacher's spans."""
        return "|".join(bytes(self.ids[start:end]).decode() for start, end in self.report.as_dict()["spans"])


class Pair:
    """The gateway's engine over both models."""

    def __init__(self, vllm: Any, pool: TeacherPool, translator: Translator, **settings: Any) -> None:
        limits = settings.pop("limits", ())
        options = settings.pop("student", {})
        ledger, prices = MemoryLedger(), PriceController(CALIBRATION, 4)
        self.shared = SharedBudgets(ledger, prices, limits)
        cooperation = Cooperation(
            teachers=one_teacher(pool, translator=translator),
            policy=Policy(CALIBRATION, expected_tokens=400),
            reserved=RESERVED,
            default_budget=Budget(fraction=0.5),
            shared=self.shared,
            **{"span_tokens": 4, **settings},
        )
        student = StudentEngine(vllm.generate, vllm.check, vllm.tokenizer, 2000, RESERVED, **options)
        self.engine = Cooperator(student, cooperation)

    async def write(
        self, budget: Any, *, prompt: Any = PROMPT, original: Any = USER, **params: Any
    ) -> Written:
        options = params.pop("options", {})
        exchange = Exchange(None if budget is None else Budget.model_validate(budget))
        prompt = dict(prompt)
        if original is not None:
            exchange.originals.append((prompt, OriginalPrompt(dict(original))))
        token = EXCHANGE.set(exchange)
        try:
            sampling = SamplingParams(**{"max_tokens": 400, "output_kind": DELTA} | params)
            outputs = self.engine.generate(prompt, sampling, "r", **options)
        finally:
            EXCHANGE.reset(token)
        collected = [output async for output in outputs]
        return Written(collected, exchange.reports[0], exchange)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """The student's tokenizer: ids are bytes, and 256 is the end of sequence."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


@pytest.fixture
def pair(tokenizer: Any) -> Callable[..., Any]:
    """A function that opens a pair: ``async with pair("The text.", ask_at={2}) as (engine, teacher)``."""

    @asynccontextmanager
    async def pair(
        text: str, *, vllm: Any = None, ask_at: Any = (), ends_at: int | None = None, **settings: Any
    ) -> AsyncIterator[tuple[Pair, FluentTeacher]]:
        theirs = settings.pop("theirs", None) or byte_level([text])
        async with AsyncExitStack() as stack:
            server = await stack.enter_async_context(FluentTeacher(theirs, text))
            teacher = Teacher(
                server.url, model="big", breaker=Breaker(3, 60.0), vocabulary=RESERVED.start, timeout=60
            )
            pool = TeacherPool([teacher], concurrency=1024, queue_seconds=5.0)
            await stack.enter_async_context(pool)
            await pool.connect()
            words = TeacherWords()
            found = Vocabularies(tokenizer, 0, words)
            await pool.check_vocabulary(found)
            assert found.found == "other"
            server.asked.clear()
            vllm = vllm or ScriptedLLM(tokenizer, ask_at, ends_at)
            translator = Translator(StudentWords(tokenizer), words, vllm.tokenizer)
            yield Pair(vllm, pool, translator, **settings), server

    return pair


def tokens_a_window(tokens: int) -> TokensPerWindow:
    return TokensPerWindow(tokens=tokens, window_seconds=3600)


async def settled(pair: Pair) -> tuple[int, int]:
    """(spent, reserved) under the only limit."""
    await asyncio.gather(*pair.shared._tasks)
    (status,) = await pair.shared.ledger.status(pair.shared.everybody)
    return status.spent, status.reserved
