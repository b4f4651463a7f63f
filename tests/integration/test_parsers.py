"""Tool calls and reasoning that two models write in turns: vLLM's parsers read the merged text."""

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest
from client import MODEL, openai_client
from openai import AsyncOpenAI, BadRequestError
from reciter import save_reciter

from server.local.pair import HOST, Pair, free_port, gateway_service, teacher_service
from server.local.processes import running

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


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway whose two models know the same text by heart, and that asks at random."""
    directory = tmp_path_factory.mktemp("reciter")
    model, config = directory / "model", directory / "gateway.yaml"
    save_reciter(PIECES, model)
    config.write_text(PARSERS)
    teacher, gateway = (f"http://{HOST}:{free_port()}" for _ in range(2))
    flags = ("--gate", "random", "--config", str(config))
    service = gateway_service(Pair(model, model, model), teacher, gateway, directory, flags)
    at = service.command.index("--router")  # it has none
    service = replace(service, command=service.command[:at] + service.command[at + 2 :])
    with running([teacher_service(model, teacher, directory), service], timeout=300):
        yield gateway


@pytest.fixture
async def client(url: str) -> AsyncIterator[AsyncOpenAI]:
    async with openai_client(url) as client:
        yield client


def request(budget: float | None, **more: Any) -> dict[str, Any]:
    extra = {"return_token_ids": True} | ({} if budget is None else {"teacher_budget": budget})
    messages = [{"role": "user", "content": "How is the weather?"}]
    return {"model": MODEL, "messages": messages, "temperature": 0, "extra_body": extra} | more


@pytest.mark.parametrize("budget", [0, 0.3, 0.6, 1])
async def test_tool_calls_and_reasoning_across_spans(client: AsyncOpenAI, budget: float) -> None:
    reply = await client.chat.completions.create(**request(budget, tools=[TOOL]))
    (choice,) = reply.choices
    assert len(choice.token_ids) == len(PIECES) + 1
    if 0 < budget < 1:
        assert len(reply.teacher["spans"]) >= 4
    assert choice.finish_reason == "tool_calls"
    assert (choice.message.reasoning, choice.message.content.strip()) == (REASONING, CONTENT)
    assert [call.function.name for call in choice.message.tool_calls] == ["weather"] * 2
    assert [json.loads(call.function.arguments)["city"] for call in choice.message.tool_calls] == CITIES


@pytest.mark.parametrize("budget", [0, 0.3, 0.6, 1])
async def test_their_deltas(client: AsyncOpenAI, budget: float) -> None:
    stream = await client.chat.completions.create(**request(budget, tools=[TOOL], stream=True))
    reasoning, content, finish = "", "", None
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    sources = set()
    async for chunk in stream:
        (choice,) = chunk.choices
        sources.add(chunk.source)
        reasoning += getattr(choice.delta, "reasoning", None) or ""
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            names[call.index] = names.get(call.index, "") + (call.function.name or "")
            arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
        finish = choice.finish_reason or finish
    assert finish == "tool_calls"
    assert (reasoning, content.strip()) == (REASONING, CONTENT)
    assert names == {0: "weather", 1: "weather"}
    assert [json.loads(arguments[i])["city"] for i in range(2)] == CITIES
    assert sources >= {0: {"student"}, 1: {"teacher"}}.get(budget, {"student", "teacher"})


async def test_a_forced_tool_is_the_students_alone(client: AsyncOpenAI) -> None:
    forced = {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}}
    with pytest.raises(BadRequestError, match="structured_outputs cannot be honoured"):
        await client.chat.completions.create(**request(0.3, **forced))


async def test_a_budget_for_thinking_is_the_students_alone(client: AsyncOpenAI) -> None:
    extra = {"teacher_budget": 0.3, "thinking_token_budget": 3}
    with pytest.raises(BadRequestError, match="thinking_token_budget cannot be honoured"):
        await client.chat.completions.create(**request(None) | {"extra_body": extra})
