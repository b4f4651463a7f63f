"""A tool among the teachers is asked first. It answers in full or not at all, and the others write the rest.

The student recites a text by place, again and again; its tokens are bytes. The tool is a calculator.
"""

import re
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from tokenizers import pre_tokenizers

from router.budget import Budget
from router.controller import PriceController
from router.ledger import MemoryLedger, TokensPerWindow
from router.money import FREE, PriceList
from router.policy import Calibration, Policy
from server.cooperation import Cooperation
from server.exchange import Exchange
from server.grammar.constraint import Continuation
from server.original_prompt import OriginalPrompt
from server.shared_budgets import SharedBudgets
from server.teacher.breaker import Breaker
from server.teacher.pool import TeacherPool
from server.teacher.teachers import NamedTeacher, Teachers
from server.teacher.tool import NamedTool, Tool
from server.teacher.words import StudentWords
from server.vllm_api import SamplingParams, VLLMValidationError
from tests.helpers.scripted_pair import Engine, ScriptedTeacher, count
from tests.helpers.scripted_student import DELTA, PROMPT, RESERVED, RecitingLLM
from tests.helpers.tiny_router import byte_tokenizer

CALIBRATION = Calibration(((0.5, 1.0),))
PRICES = PriceList.model_validate(
    {"student": {"input": 0, "output": 0}, "teacher": {"big": {"input": 1, "output": 2}}}
)
SUM = re.compile(r"(\d+)\+(\d+)=$")


class Calculator:
    """A tool that answers if the text ends in a sum."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.answer: Callable[[dict[str, Any]], web.Response] = self.add

    async def reply(self, request: web.Request) -> web.Response:
        self.asked.append(await request.json())
        self.keys.append(request.headers.get("Authorization"))
        return self.answer(self.asked[-1])

    @staticmethod
    def add(asked: dict[str, Any]) -> web.Response:
        match = SUM.search(asked["text"])
        if match is None:
            return web.Response(status=204)
        return web.json_response({"text": str(int(match[1]) + int(match[2]))})


class Desk:
    """The gateway's engine over a reciting student, a calculator and a scripted teacher."""

    def __init__(self, engine: Engine, calculator: Calculator, big: ScriptedTeacher, shared: SharedBudgets):
        self.engine = engine
        self.calculator = calculator
        self.big = big
        self.shared = shared

    async def text(self, budget: Any, original: Any = None, **params: Any) -> str:
        exchange = Exchange(Budget.model_validate(budget))
        prompt = dict(PROMPT)
        if original is not None:
            exchange.originals.append((prompt, OriginalPrompt(original)))
        sampling = SamplingParams(**{"max_tokens": 20, "output_kind": DELTA} | params)
        outputs = [output async for output in self.engine.generate(sampling, exchange, prompt)]
        return "".join(new.text for output in outputs for new in output.outputs)

    @property
    def report(self) -> dict[str, Any]:
        (report,) = self.engine.exchange.reports
        return report.as_dict()


Open = Callable[..., AbstractAsyncContextManager[Desk]]


@pytest.fixture
def desk() -> Open:
    """A function that opens a desk: ``async with desk("3+4=...", {4})`` recites and asks after four bytes."""

    @asynccontextmanager
    async def desk(text: str, ask_at: Any, *, limits: Any = (), alone: bool = False, **settings: Any) -> Any:
        tokenizer = byte_tokenizer()
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        calculator = Calculator()
        app = web.Application()
        app.router.add_post("/add", calculator.reply)
        async with AsyncExitStack() as stack:
            server = TestServer(app)
            await server.start_server()
            stack.push_async_callback(server.close)
            url = str(server.make_url("/add"))
            tool = Tool(url, api_key="sk-1", timeout=5.0, breaker=Breaker(1, 60.0), of="calculator")
            pool = TeacherPool([tool], concurrency=8, queue_seconds=5.0)
            await stack.enter_async_context(pool)
            await pool.connect()
            prices = settings.get("prices")
            named = NamedTool("calculator", pool, prices and FREE)
            words = StudentWords(tokenizer)
            named.student_words, named.tokenizer = lambda: words, tokenizer
            big = ScriptedTeacher()
            each = [NamedTeacher("big", big, prices and prices.of_teacher("big")), named]
            vllm = RecitingLLM(tokenizer, text, ask_at)
            student = settings.pop("student", {})
            shared = SharedBudgets(MemoryLedger(), PriceController(CALIBRATION, 4), limits)
            cooperation = Cooperation(
                teachers=Teachers(each[alone:]),
                policy=Policy(CALIBRATION, expected_tokens=20),
                reserved=RESERVED,
                default_budget=Budget(fraction=0.5),
                shared=shared,
                **{"span_tokens": 4, "ask_tokens": 1, **settings},
            )
            yield Desk(Engine(vllm, cooperation, **student), calculator, big, shared)

    return desk


async def test_a_forbidden_answer_of_the_tool_is_not_used(desk: Open) -> None:
    async with desk("13+29=?", {6}, alone=True) as table:
        assert (await table.text(0.5, bad_words=["42"]))[:7] == "13+29=?"
        assert (table.report["tokens"], len(table.calculator.asked)) == (0, 1)


async def test_a_tool_writes_what_it_knows(desk: Open) -> None:
    """The tool writes the whole answer, although a teacher's call has one token."""
    async with desk("13+29=?", {6}) as table:
        assert (await table.text(0.5))[:10] == "13+29=423+"
        assert table.report["teachers"] == {"calculator": {"tokens": 2, "calls": 1, "spans": [[6, 8]]}}
        assert table.calculator.asked == [{"prompt": "Hi", "text": "13+29=", "max_tokens": 14}]
        assert table.calculator.keys == ["Bearer sk-1"]
        assert count("wheels_teacher_calls_total", teacher="calculator", outcome="ok") >= 1


async def test_questions_that_the_tool_cannot_answer_go_to_a_teacher(desk: Open) -> None:
    """Such a question does not count as a call of the tool."""
    async with desk("abcdefgh", {3}) as table:
        assert await table.text({"calls": 1}, max_tokens=8) == "abcDefgh"
        assert table.report["teachers"].keys() == {"big"}
        assert (table.report["calls"], table.report["denied"]) == (1, {})
        assert len(table.calculator.asked) == 1


async def test_a_tool_alone_is_asked_again_and_again_and_costs_nothing(desk: Open) -> None:
    async with desk("2+2=?", range(40), alone=True) as table:
        assert (await table.text({"calls": 1}))[:6] == "2+2=42"
        assert (table.report["calls"], table.report["tokens"]) == (1, 1)
        assert len(table.calculator.asked) == 5  # at 0, 1, 2, 3 and 4; then its call is spent


async def test_at_a_budget_of_one_the_tool_comes_first(desk: Open) -> None:
    async with desk("x", ()) as table:
        table.calculator.answer = lambda _: web.json_response({"text": "tool "})
        assert (await table.text({"fraction": 1, "teachers": ["calculator"]}, max_tokens=10)) == "tool tool "
        assert (await table.text({"fraction": 1, "teachers": ["big"]}, max_tokens=4)) == "ABCD"


async def test_a_tool_without_prices_is_free(desk: Open) -> None:
    """Only the teacher costs anything: it reads 10 tokens and writes two for 14 millionths."""
    async with desk("13+29=?", {6, 8}, prices=PRICES) as table:
        assert await table.text({"cost": 15e-6}, max_tokens=10) == "13+29=42IJ"
        assert table.report["cost"] == pytest.approx(14e-6)
        assert "cost" not in table.report["teachers"]["calculator"]


async def test_what_a_tool_wrote_is_not_recorded(desk: Open) -> None:
    class Notes:
        def __init__(self) -> None:
            self.noted: list[Any] = []

        def note(self, choice: Any) -> None:
            self.noted.append(choice)

    for text, noted in (("13+29=?", 0), ("abcdef?", 1)):
        notes = Notes()
        async with desk(text, {6}, recorder=notes) as table:
            await table.text(0.5)
        assert len(notes.noted) == noted


async def test_a_grammar_that_refuses_a_part_of_an_answer_forgets_the_rest_of_it(desk: Open) -> None:
    class OneToken:
        """A grammar that takes the first token of an answer."""

        fed = 0

        async def catch_up(self, token_ids: list[int]) -> bool:
            self.fed = len(token_ids)
            return True

        def take(self, token_ids: list[int]) -> int:
            self.fed += 1
            return 1

        def continuation(self, prompt_tokens: int) -> Continuation:
            return Continuation({}, {})

    grammar = OneToken()
    student = {"constrain": lambda *_: grammar}
    async with desk("13+29=?", {6}, alone=True, student=student) as table:
        assert await table.text(0.5, max_tokens=8) == "13+29=?1"
    assert grammar.fed == 6


async def test_the_tool_reads_the_chat(desk: Open) -> None:
    messages = [{"role": "user", "content": "Add!"}]
    async with desk("1+1=", {4}) as table:
        assert (await table.text(0.5, {"messages": messages, "add_generation_prompt": True}))[:5] == "1+1=2"
        (asked,) = table.calculator.asked
        assert (asked["messages"], "prompt" in asked) == (messages, False)


@pytest.mark.parametrize(
    "answer",
    [
        lambda _: web.Response(status=500),
        lambda _: web.Response(text="no JSON"),
        lambda _: web.json_response({"text": 4}),
        lambda _: web.json_response({"text": 4}, status=404),
    ],
)
async def test_if_the_tool_fails_the_teachers_go_on(desk: Open, answer: Any) -> None:
    async with desk("abcdefgh", {3}) as table:
        table.calculator.answer = answer
        assert await table.text(0.5, max_tokens=8) == "abcDefgh"
        assert (table.report["degraded"], table.report["denied"]) == (False, {})
    async with desk("abcdefgh", {3}, alone=True) as table:
        table.calculator.answer = answer
        assert await table.text(0.5, max_tokens=8) == "abcdefgh"
        assert table.report["degraded"] is True


async def test_an_answer_that_does_not_fit_is_not_used(desk: Open) -> None:
    """After 8 bytes, a fraction of 0.1 and a span of 4 leave 5 tokens: (0.1 · 8 + 4) / 0.9."""
    for answer, text in (("12345", "1+1=x1+1" + "12345"), ("123456", "1+1=x1+1=x1+1")):
        async with desk("1+1=x", {8}, alone=True) as table:
            table.calculator.answer = lambda _, answer=answer: web.json_response({"text": answer})
            assert await table.text(0.1, max_tokens=60) != ""
            assert (await table.text(0.1, max_tokens=60)).startswith(text)
            assert table.calculator.asked[-1]["max_tokens"] == 5


async def test_an_answer_may_end_with_the_completion(desk: Open) -> None:
    async with desk("1+1=x", {4}, alone=True) as table:
        table.calculator.answer = lambda _: web.json_response({"text": "123456789"})
        assert await table.text(0.9, max_tokens=7) == "1+1=123"


async def test_whole_characters_cross(desk: Open) -> None:
    async with desk("say: ", {5}, alone=True) as table:
        table.calculator.answer = lambda _: web.json_response({"text": "🙂你é"})
        assert (await table.text(0.9, max_tokens=30)).startswith("say: 🙂你é say:")


async def test_limits_count_the_tokens_of_the_tool(desk: Open) -> None:
    limits = [TokensPerWindow(tokens=9, window_seconds=60)]
    async with desk("13+29=?", {6}, alone=True, limits=limits) as table:
        assert (await table.text(0.5))[:8] == "13+29=42"
        await table.shared.aclose()
        (status,) = await table.shared.ledger.status(table.shared.everybody)
        assert (status.spent, status.reserved) == (2, 0)


async def test_a_parameter_about_ids_leaves_the_tool_out(desk: Open) -> None:
    async with desk("1+1=", {4}) as table:
        assert (await table.text(0.5, logit_bias={5: 1.0}))[:5] == "1+1=E"
        assert table.calculator.asked == []
    async with desk("1+1=", {4}, alone=True) as table:
        with pytest.raises(VLLMValidationError, match="logit_bias cannot be used"):
            await table.text(0.5, logit_bias={5: 1.0})


async def test_a_tool_whose_server_is_gone_is_down(desk: Open) -> None:
    async with desk("1+1=", {4}) as table:
        pool = table.engine.cooperator.cooperation.teachers.tools[0].pool
        assert await pool.healthy() is True  # the tool has no /health: any answer is enough
        pool.replicas[0].teacher._connection.url = "http://127.0.0.1:1"
        await pool._probe(pool.replicas[0])
        assert pool.down
        assert (await table.text(0.5))[:5] == "1+1=E"
