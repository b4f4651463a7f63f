"""vLLM's parsers of reasoning and tool calls read the gateway's streams, whatever pieces the text comes in.

Two scripted models recite one text each in pieces of several tokens, as a busy vLLM merges them and a teacher
sends them. A parser must read the same from the stream as from the whole answer.
"""

import itertools
import json
import re
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser.parser_manager import ParserManager

from router.budget import Budget
from router.controller import PriceController
from router.ledger import MemoryLedger
from router.policy import Calibration, Policy
from server.completion import Piece, new_detokenizer
from server.cooperation import Cooperation
from server.exchange import EXCHANGE, Exchange
from server.gate_processor import NOT_BEFORE, PRICE
from server.shared_budgets import SharedBudgets
from server.single_tokens import SingleTokens
from server.teacher.ask import Ask
from server.vllm_api import CompletionOutput, Logprob, RequestOutput, SamplingParams
from tests.helpers.one_teacher import one_teacher
from tests.helpers.scripted_student import DELTA, INF, RESERVED, cooperator

CALIBRATION = Calibration(((0.5, 1.0),))
PROMPT_IDS = [0]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = '{"name": "weather", "arguments": {"city": "Zürich"}}'
BEGIN, SEPARATOR = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "<｜tool▁sep｜>"
END = "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
SPECIAL = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>"),
    *(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        SEPARATOR,
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
    ),
)
THOUGHT = "<think>First the weather, then the rest.</think>Let me look."
ANSWERS = {
    "deepseek_r1": (None, "deepseek_r1", THOUGHT),
    "qwen3": (None, "qwen3", THOUGHT),
    "hermes": ("hermes", None, f"Let me look.\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>"),
    "hermes, deepseek_r1": ("hermes", "deepseek_r1", f"{THOUGHT}\n<tool_call>{CALL}</tool_call>"),
    "qwen3_coder": (
        "qwen3_coder",
        "qwen3",
        f"{THOUGHT}<tool_call>\n<function=weather>\n<parameter=city>\nZürich\n</parameter>\n</function>\n</tool_call>",
    ),
    "xlam": ("xlam", None, f"[{CALL}]"),
    "xlam, two": ("xlam", None, f"[{CALL}, {CALL}]"),
    "mistral": ("mistral", None, f"[TOOL_CALLS][{CALL}]"),
    "llama3_json": ("llama3_json", None, CALL.replace("arguments", "parameters")),
    "granite-20b-fc": ("granite-20b-fc", None, f"<function_call> {CALL}"),
    "deepseek_v3": (
        "deepseek_v3",
        None,
        f'{BEGIN}function{SEPARATOR}weather\n```json\n{{"city": "Zürich"}}\n```{END}',
    ),
    "deepseek_v31": ("deepseek_v31", None, f'{BEGIN}weather{SEPARATOR}{{"city": "Zürich"}}{END}'),
}


class Script:
    """A text in tokens of up to three characters, and a tokenizer with these tokens."""

    def __init__(self, text: str) -> None:
        special = "|".join(map(re.escape, SPECIAL))
        words = re.findall(rf"{special}|\s?\w{{1,3}}|[^\w\s]{{1,2}}?|\s", text)
        assert "".join(words) == text
        self.text = text
        vocabulary = {"<prompt>": 0, "<end>": 1}
        for word in (*SPECIAL, *words):
            vocabulary.setdefault(word, len(vocabulary))
        fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<prompt>"))
        fast.decoder = decoders.Fuse()
        fast.add_tokens([*SPECIAL, "<end>"])
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>")
        self.ids = [*(vocabulary[word] for word in words), 1]
        assert len(vocabulary) < RESERVED.start


class Recital:
    """A student and a teacher that know the text by heart and write it in pieces of some lengths, in turn."""

    def __init__(self, script: Script, lengths: tuple[int, ...], ask_every: int) -> None:
        self.script, self.ask_every = script, ask_every
        self._lengths = itertools.cycle(lengths)
        self.tokenizer = script.tokenizer
        self.segments: list[Any] = []
        self.max_model_len, self.down = None, False

    def check(self, prompt: Any, params: SamplingParams, request_id: str, **_: Any) -> SamplingParams:
        return params  # the parameters are valid

    async def generate(
        self, prompt: Any, params: SamplingParams, request_id: str, **_: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        terms, start = params.extra_args or {}, len(prompt["prompt_token_ids"]) - len(PROMPT_IDS)
        text = new_detokenizer(self.tokenizer, prompt["prompt_token_ids"], params)
        asks = terms.get(PRICE, INF) < INF
        until = max(self.ask_every, terms.get(NOT_BEFORE, 0)) if asks else len(self.script.ids)
        for ids, ends in self._pieces(start, until):
            text.update(ids, ends)
            yield self._output(ids, text.get_next_output_text(ends, True), "stop" if ends else None)
            if ends:
                return
        yield self._output([RESERVED.escalation], "", "stop")

    async def write(self, slot: Any, ask: Ask, **_: Any) -> AsyncGenerator[Piece, None]:
        start = len(ask.prompt_ids) - len(PROMPT_IDS)
        ids = self.script.ids[start : start + ask.tokens]
        ends = ids[-1] == 1
        yield Piece(ids, [{i: Logprob(-0.5)} for i in ids], "stop" if ends else "length")

    async def admit(self, key: bytes) -> "Recital":
        return self

    def release(self) -> None:
        """Do nothing: there is room for all calls."""

    def _pieces(self, start: int, count: int) -> Iterator[tuple[list[int], bool]]:
        end = min(start + count, len(self.script.ids))
        while start < end:
            ids = self.script.ids[start : min(end, start + next(self._lengths))]
            start += len(ids)
            yield ids, start == len(self.script.ids)

    @staticmethod
    def _output(ids: list[int], text: str, reason: str | None) -> RequestOutput:
        logprobs = [{i: Logprob(-1.0)} for i in ids]
        new = CompletionOutput(0, text, ids, -1.0, logprobs, finish_reason=reason)
        return RequestOutput("r", None, PROMPT_IDS, None, [new], reason is not None)


async def streamed(recital: Recital, budget: float, **params: Any) -> list[tuple[CompletionOutput, str]]:
    """The outputs that the HTTP layer gets, each with its author."""
    cooperation = Cooperation(
        teachers=one_teacher(recital),
        policy=Policy(CALIBRATION, expected_tokens=20),
        reserved=RESERVED,
        span_tokens=8,
        default_budget=Budget(fraction=0.5),
        shared=SharedBudgets(MemoryLedger(), PriceController(CALIBRATION, 8)),
        parsers=True,
    )
    exchange = Exchange(Budget(fraction=budget))
    prompt = {"type": "token", "prompt": "", "prompt_token_ids": PROMPT_IDS}
    sampling = SamplingParams(
        **{"max_tokens": 150, "output_kind": DELTA, "skip_special_tokens": False} | params
    )
    token = EXCHANGE.set(exchange)
    try:
        outputs = cooperator(recital, cooperation).generate(prompt, sampling, "r")
    finally:
        EXCHANGE.reset(token)
    return [(output.outputs[0], exchange.latest.source) async for output in outputs]


def new_parser(answer: str, script: Script) -> Any:
    tool_parser, reasoning_parser, _ = ANSWERS[answer]
    parser = ParserManager.get_parser(tool_parser, reasoning_parser, tool_parser is not None)
    return parser(script.tokenizer, request().tools)


def request() -> ChatCompletionRequest:
    return ChatCompletionRequest(
        messages=[{"role": "user", "content": "?"}], tools=TOOLS, skip_special_tokens=False
    )


Parsed = tuple[str, str, list[tuple[str, Any]]]
"""(reasoning, content, calls as (name, arguments))."""


def parsed_stream(answer: str, script: Script, outputs: list[CompletionOutput]) -> Parsed:
    """The stream as vLLM's chat endpoint parses it."""
    parser, asked = new_parser(answer, script), request()
    reasoning = content = ""
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for new in outputs:
        finished = new.finish_reason is not None
        delta = parser.parse_delta(new.text, list(new.token_ids), asked, PROMPT_IDS, finished=finished)
        if delta is None:
            continue
        reasoning += delta.reasoning or ""
        content += delta.content or ""
        for call in delta.tool_calls or ():
            names[call.index] = names.get(call.index, "") + (call.function.name or "")
            arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
    return reasoning, content.strip(), [(names[i], json.loads(arguments[i])) for i in sorted(names)]


def parsed_whole(answer: str, script: Script) -> Parsed:
    parser = new_parser(answer, script)
    reasoning, content, calls = parser.parse(
        script.text, request(), enable_auto_tools=True, model_output_token_ids=script.ids
    )
    read = [(call.name, json.loads(call.arguments)) for call in calls or ()]
    return reasoning or "", (content or "").strip(), read


@pytest.mark.parametrize("answer", ANSWERS)
async def test_a_parser_reads_a_stream_as_it_reads_the_whole(answer):
    script = Script(ANSWERS[answer][2])
    whole = parsed_whole(answer, script)
    assert whole[0] or whole[2], "the text has something to parse"
    for budget, lengths in itertools.product((0, 0.3, 0.7, 1), ((2, 3), (1, 5, 13), (200,))):
        outputs = await streamed(Recital(script, lengths, ask_every=3), budget)
        assert all(len(new.token_ids) == 1 for new, _ in outputs), (budget, lengths)
        assert parsed_stream(answer, script, [new for new, _ in outputs]) == whole, (budget, lengths)


@pytest.mark.parametrize("budget", [0, 0.5, 1])
async def test_tokens_log_probabilities_and_authors_stay_with_each_other(budget):
    script = Script("one two three four five six seven")
    outputs = await streamed(Recital(script, (5,), ask_every=3), budget, logprobs=0)
    ids = [token for new, _ in outputs for token in new.token_ids]
    assert ids == script.ids
    assert "".join(new.text for new, _ in outputs) == script.text
    values = {"student": -1.0, "teacher": -0.5}
    for new, source in outputs:
        (entry,) = new.logprobs
        assert entry[new.token_ids[0]].logprob == values[source]
    assert {source for _, source in outputs} == {0: {"student"}, 1: {"teacher"}}.get(budget, set(values))
    assert [new.finish_reason for new, _ in outputs] == [None] * (len(ids) - 1) + ["stop"]


@pytest.mark.parametrize("stop", [None, "fo", "four", "three f", "ven"])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("include", [False, True])
def test_a_split_stream_has_the_text_that_vllm_gave_it(stop, length, include):
    """Two choices as the engine writes them: it keeps the rest of a piece in which a stop string ends."""
    script = Script("one two three four five six seven")
    params = SamplingParams(n=2, stop=stop, include_stop_str_in_output=include, output_kind=DELTA)
    texts = [new_detokenizer(script.tokenizer, PROMPT_IDS, params) for _ in range(2)]
    single_tokens = SingleTokens(script.tokenizer, PROMPT_IDS, params)
    for index, text in enumerate(texts):
        given, got = [], []
        for start in range(0, len(script.ids), length):
            ids = script.ids[start : start + length]
            ends = ids[-1] == 1
            matched = text.update(list(ids), ends)
            reason = "stop" if ends or matched else None
            new = CompletionOutput(
                index,
                text.get_next_output_text(reason is not None, True),
                ids,
                0.0,
                None,
                finish_reason=reason,
            )
            new.stop_reason = matched
            given.append(new)
            split = single_tokens.split(
                RequestOutput("r", None, PROMPT_IDS, None, [new], index == 1 and ends)
            )
            got += [part.outputs[0] for part in split]
            if reason is not None:
                break
        assert "".join(new.text for new in got) == "".join(new.text for new in given)
        assert [i for new in got for i in new.token_ids] == [i for new in given for i in new.token_ids]
        assert (got[-1].finish_reason, got[-1].stop_reason) == ("stop", given[-1].stop_reason)
        assert all(new.finish_reason is None and len(new.token_ids) == 1 for new in got[:-1])


def test_an_output_without_tokens_stays_one():
    script = Script("one")
    single_tokens = SingleTokens(script.tokenizer, PROMPT_IDS, SamplingParams(output_kind=DELTA))
    new = CompletionOutput(0, "", [], 0.0, None, finish_reason="abort")
    (part,) = single_tokens.split(RequestOutput("r", None, PROMPT_IDS, None, [new], True))
    assert (part.finished, part.outputs[0].finish_reason, part.outputs[0].token_ids) == (True, "abort", [])
