"""Tool calls and reasoning that two models write in turns: vLLM's parsers read the merged text."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest
from openai import AsyncOpenAI

from measuring.pair import HOST, START_SECONDS, Pair, Serving, free_port, gateway_service, teacher_service
from measuring.processes import running
from tests.helpers.client import MODEL, UNHURRIED, openai_client
from tests.helpers.reciter import save_reciter
from tests.helpers.replies import comparable

REASONING, CONTENT = "Two cities, so two calls.", "Let me look."
CITIES = ["Zürich", "Genf"]
PIECES = [
    *("<think>", "Two", " cities,", " so", " two", " calls", ".", "</think>"),
    *("Let", " me", " look", ".\n"),
    *(
        "<tool_call>",
        '{"na',
        'me": "wea',
        'ther", "argu',
        'ments": {"city',
        '": "Zü',
        "rich",
        '"}}',
        "</tool_call>",
    ),
    *(
        "\n\n",
        "<tool",
        "_call>",
        '{"name": ',
        '"weather", ',
        '"arguments": ',
        '{"city": ',
        '"Genf"',
        "}",
        " }",
        "</tool",
    ),
    "_call> ",
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
PARSERS = "vllm: {enable-auto-tool-choice: true, tool-call-parser: hermes, reasoning-parser: deepseek_r1}"
STOCK = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "deepseek_r1")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A gateway whose two models know the same text by heart, and that asks at random."""
    directory = tmp_path_factory.mktemp("reciter")
    model, config = directory / "model", directory / "gateway.yaml"
    save_reciter(PIECES, model)
    config.write_text(PARSERS)
    teacher, gateway = (f"http://{HOST}:{free_port()}" for _ in range(2))
    flags = (*UNHURRIED, "--gate", "random", "--config", str(config))
    service = gateway_service(Pair(model, model, model), teacher, gateway, directory, flags)
    at = service.command.index("--router")  # this gateway has no router
    service = replace(service, command=service.command[:at] + service.command[at + 2 :])
    stock = teacher_service(model, teacher, directory, flags=STOCK)
    with running([stock, service], timeout=START_SECONDS) as (teacher_process, gateway_process):
        yield Serving(teacher, gateway, teacher_process, gateway_process)


@pytest.fixture
async def client(servers: Serving) -> AsyncIterator[AsyncOpenAI]:
    async with openai_client(servers.gateway) as client:
        yield client


@pytest.fixture
async def stock(servers: Serving) -> AsyncIterator[AsyncOpenAI]:
    async with openai_client(servers.teacher) as client:
        yield client


def request(budget: float | None, **more: Any) -> dict[str, Any]:
    extra = {"return_token_ids": True} | ({} if budget is None else {"teacher_budget": budget})
    messages = [{"role": "user", "content": "How is the weather?"}]
    return {"model": MODEL, "messages": messages, "temperature": 0, "extra_body": extra} | more


@pytest.mark.parametrize("budget", [0, 0.3, 0.6, 1])
async def test_tool_calls_and_reasoning_are_parsed_across_spans(client: AsyncOpenAI, budget: float) -> None:
    reply = await client.chat.completions.create(**request(budget, tools=[TOOL]))
    (choice,) = reply.choices
    assert len(choice.token_ids) == len(PIECES) + 1
    if 0 < budget < 1:
        assert len(reply.teacher["spans"]) >= 4
    assert choice.finish_reason == "tool_calls"
    assert (choice.message.reasoning, choice.message.content.strip()) == (REASONING, CONTENT)
    assert [call.function.name for call in choice.message.tool_calls] == ["weather"] * 2
    assert [json.loads(call.function.arguments)["city"] for call in choice.message.tool_calls] == CITIES


class Streamed:
    """The parts of a stream, put together as a client does."""

    def __init__(self) -> None:
        self.reasoning, self.content, self.finish = "", "", None
        self.names: dict[int, str] = {}
        self.arguments: dict[int, str] = {}
        self.sources: set[str] = set()
        self.lengths: set[int] = set()

    def add(self, chunk: Any) -> None:
        (choice,) = chunk.choices
        self.sources.add(chunk.source)
        self.lengths.add(len(getattr(choice, "token_ids", None) or ()))
        self.reasoning += getattr(choice.delta, "reasoning", None) or ""
        self.content += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            self.names[call.index] = self.names.get(call.index, "") + (call.function.name or "")
            self.arguments[call.index] = self.arguments.get(call.index, "") + (call.function.arguments or "")
        self.finish = choice.finish_reason or self.finish


async def streamed(client: AsyncOpenAI, budget: float) -> Streamed:
    stream = await client.chat.completions.create(**request(budget, tools=[TOOL], stream=True))
    result = Streamed()
    async for chunk in stream:
        result.add(chunk)
    return result


@pytest.mark.parametrize("budget", [0, 0.3, 0.6, 1])
async def test_deltas_of_tool_calls_and_reasoning_are_right_under_load(
    client: AsyncOpenAI, budget: float
) -> None:
    """With many streams at once, the models' text comes in pieces of several tokens."""
    for result in await asyncio.gather(*(streamed(client, budget) for _ in range(12))):
        assert result.finish == "tool_calls"
        assert (result.reasoning, result.content.strip()) == (REASONING, CONTENT)
        assert result.names == {0: "weather", 1: "weather"}
        assert [json.loads(result.arguments[i])["city"] for i in range(2)] == CITIES
        assert result.sources >= {0: {"student"}, 1: {"teacher"}}.get(budget, {"student", "teacher"})
        assert result.lengths <= {0, 1}


@pytest.mark.parametrize("budget", [0, 0.3, 0.6, 1])
async def test_a_grammar_begins_after_the_reasoning(client: AsyncOpenAI, budget: float) -> None:
    """Both models know the text after the reasoning by heart, but the grammar wants another end."""
    extra = {"teacher_budget": budget, "structured_outputs": {"regex": r"Let me<tool_call>\n\n"}}
    reply = await client.chat.completions.create(**request(None) | {"extra_body": extra})
    (choice,) = reply.choices
    assert (choice.message.reasoning, choice.message.content) == (REASONING, "Let me<tool_call>\n\n")
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize("tokens", [0, 3, 5, 90])
@pytest.mark.parametrize("budget", [0, 0.3, 0.6, 1])
async def test_a_budget_for_thinking_counts_the_tokens_of_both_models(
    client: AsyncOpenAI, budget: float, tokens: int
) -> None:
    """The marker of the end comes where the budget ends, and the text goes on after it."""
    asked = request(budget, tools=[TOOL])
    asked["extra_body"]["thinking_token_budget"] = tokens
    (choice,) = (await client.chat.completions.create(**asked)).choices
    assert (choice.message.reasoning or "") == "".join(PIECES[1:7][:tokens])
    assert choice.message.content.strip() == CONTENT
    assert [call.function.name for call in choice.message.tool_calls] == ["weather"] * 2


FUNCTION = TOOL["function"]
STRICT = {"type": "function", "function": FUNCTION | {"strict": True}}
FORCED = {
    "required": "required",
    "named": {"type": "function", "function": {"name": FUNCTION["name"]}},
    "auto": "auto",
}


def one_call(choice: str, **more: Any) -> dict[str, Any]:
    """A request for one call; vLLM holds the text to a grammar of the parser's own format."""
    asked = request(None, tools=[STRICT], tool_choice=FORCED[choice], parallel_tool_calls=False)
    return asked | {"max_tokens": 60} | more


@pytest.mark.parametrize("choice", FORCED)
@pytest.mark.parametrize("budget", [0, 0.3, 0.6, 1])
async def test_a_strict_call_follows_the_reasoning(
    client: AsyncOpenAI, stock: AsyncOpenAI, budget: float, choice: str
) -> None:
    """Without the grammar, the models would write more before a forced call and after a single one."""
    theirs = await stock.chat.completions.create(**one_call(choice, model="teacher"))
    extra = {"teacher_budget": budget, "return_token_ids": True}
    ours = await client.chat.completions.create(**one_call(choice, extra_body=extra))
    assert comparable(ours.to_dict()) == comparable(theirs.to_dict())
    assert ours.choices[0].message.reasoning == REASONING
    (call,) = ours.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": CITIES[0]})
    assert ours.teacher["tokens"] > 0 or budget < 1


@pytest.mark.parametrize("choice", FORCED)
@pytest.mark.parametrize("budget", [0, 0.3, 0.6, 1])
async def test_deltas_of_a_strict_call_give_the_whole_call(
    client: AsyncOpenAI, stock: AsyncOpenAI, budget: float, choice: str
) -> None:
    extra = {"return_token_ids": True}
    theirs = await stock.chat.completions.create(**one_call(choice, model="teacher"))
    ours = one_call(choice, extra_body=extra | {"teacher_budget": budget}, stream=True)
    result = Streamed()
    async for chunk in await client.chat.completions.create(**ours):
        result.add(chunk)
    assert (result.reasoning, result.names) == (REASONING, {0: "weather"})
    assert json.loads(result.arguments[0]) == {"city": CITIES[0]}
    assert result.finish == theirs.choices[0].finish_reason
