"""Forced tools: two models write the call that a stock server with one of them writes.

Student and teacher are one model here, which decodes greedily. So the replies of gateway and stock server
are the same at every budget, in every field.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from measuring.pair import HOST, START_SECONDS, Pair, Serving, free_port, gateway_service, teacher_service
from measuring.processes import running
from tests.helpers.client import MODEL, PATIENCE, UNHURRIED, openai_client
from tests.helpers.replies import comparable
from tests.helpers.schemas import FLAG, SHORT, SMALL, TOOLS, items, record
from tests.helpers.structured import ask_for_tool, check_all

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
# The shipped models do not know JSON, and would fill it with spaces. This parser takes plain JSON.
GRAMMAR = '{"backend": "xgrammar", "disable_any_whitespace": true}'
PARSER = "xlam"
CONFIG = f"""
vllm:
  structured-outputs-config: {GRAMMAR}
  enable-auto-tool-choice: true
  tool-call-parser: {PARSER}
"""
STOCK = ("--structured-outputs-config", GRAMMAR, "--enable-auto-tool-choice", "--tool-call-parser", PARSER)
SCHEMA = record(
    {"when": {"enum": ["morning", "night"]}, "note": SHORT, "loud": FLAG, "rooms": items(SMALL, 1, 2)}
)
NAMES = ("wake", "sleep")
QUESTION = [{"role": "user", "content": "Karl has ten brothers and three sisters."}]
BUDGETS = pytest.mark.parametrize("budget", [0, 0.2, 1])
CHOICES = pytest.mark.parametrize("choice", ["required", "named"])


@pytest.fixture(scope="module")
def servers(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """The student on a stock server, and on a gateway that asks this server at random."""
    directory = tmp_path_factory.mktemp("tools")
    config = directory / "gateway.yaml"
    config.write_text(CONFIG)
    stock, gateway = (f"http://{HOST}:{free_port()}" for _ in range(2))
    twins = Pair(pair.student, pair.student, pair.router)
    flags = (*UNHURRIED, "--gate", "random", "--config", str(config))
    services = (
        teacher_service(pair.student, stock, directory, flags=STOCK),
        gateway_service(twins, stock, gateway, directory, flags),
    )
    with running(services, timeout=START_SECONDS) as (teacher, child):
        yield Serving(stock, gateway, teacher, child)


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=PATIENCE) as http:
        yield http


@pytest.fixture
async def client(servers: Serving) -> AsyncIterator[AsyncOpenAI]:
    async with openai_client(servers.gateway) as client:
        yield client


@pytest.fixture
async def claude(servers: Serving) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(
        base_url=servers.gateway, api_key="none", max_retries=0, timeout=PATIENCE
    ) as claude:
        yield claude


def asked(path: str, choice: str) -> dict[str, Any]:
    """A request that has to call any of two tools, or the second one."""
    description = "Does what it is called."
    if path == CHAT:
        functions = [{"name": n, "description": description, "parameters": SCHEMA} for n in NAMES]
        named: Any = {"type": "function", "function": {"name": NAMES[1]}}
        return {
            "messages": QUESTION,
            "tools": [{"type": "function", "function": function} for function in functions],
            "tool_choice": named if choice == "named" else choice,
            "parallel_tool_calls": False,
            "max_tokens": 150,
            "temperature": 0,
        }
    if path == RESPONSES:
        tool = {"type": "function", "description": description, "parameters": SCHEMA}
        named = {"type": "function", "name": NAMES[1]}
        return {
            "input": QUESTION,
            "tools": [tool | {"name": name} for name in NAMES],
            "tool_choice": named if choice == "named" else choice,
            "parallel_tool_calls": False,
            "max_output_tokens": 150,
            "temperature": 0,
        }
    tools = [{"name": name, "description": description, "input_schema": SCHEMA} for name in NAMES]
    named = {"type": "tool", "name": NAMES[1]} if choice == "named" else {"type": "any"}
    one = {"disable_parallel_tool_use": True}
    return {
        "messages": QUESTION,
        "tools": tools,
        "tool_choice": named | one,
        "max_tokens": 150,
        "temperature": 0,
    }


def calls_of(reply: dict[str, Any]) -> list[tuple[str, Any]]:
    """(name, arguments) of the tools that a reply calls, for every API."""
    if "choices" in reply:
        calls = reply["choices"][0]["message"]["tool_calls"]
        return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
    if "output" in reply:
        items = [item for item in reply["output"] if item["type"] == "function_call"]
        return [(item["name"], json.loads(item["arguments"])) for item in items]
    blocks = [block for block in reply["content"] if block["type"] == "tool_use"]
    return [(block["name"], block["input"]) for block in blocks]


def check(reply: dict[str, Any], choice: str, budget: float) -> None:
    ((name, arguments),) = calls_of(reply)
    assert name == NAMES[1] if choice == "named" else name in NAMES
    jsonschema.validate(arguments, SCHEMA)
    check_teacher(reply["teacher"], budget)


def check_teacher(report: dict[str, Any], budget: float) -> None:
    assert (report["tokens"] > 0) == (budget > 0)
    assert report["denied"].keys() <= {"budget"}


@CHOICES
@BUDGETS
@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
async def test_a_forced_call_equals_that_of_a_stock_server(
    http: httpx.AsyncClient, servers: Serving, path: str, budget: float, choice: str
) -> None:
    body = asked(path, choice)
    theirs = await http.post(servers.teacher + path, json=body | {"model": "teacher"})
    ours = await http.post(servers.gateway + path, json=body | {"model": MODEL, "teacher_budget": budget})
    assert (ours.status_code, theirs.status_code) == (200, 200), (ours.text, theirs.text)
    assert comparable(ours.json()) == comparable(theirs.json())
    check(ours.json(), choice, budget)


@CHOICES
@BUDGETS
async def test_a_streamed_chat_brings_the_same_call(client: AsyncOpenAI, budget: float, choice: str) -> None:
    body = asked(CHAT, choice) | {"model": MODEL, "extra_body": {"teacher_budget": budget}}
    whole = (await client.chat.completions.create(**body)).to_dict()
    name, arguments, finish, teacher = "", "", None, None
    async for chunk in await client.chat.completions.create(**body, stream=True):
        (part,) = chunk.choices
        for call in part.delta.tool_calls or ():
            assert call.index == 0
            name += call.function.name or ""
            arguments += call.function.arguments or ""
        finish = part.finish_reason or finish
        teacher = getattr(chunk, "teacher", None) or teacher
    assert [(name, json.loads(arguments))] == calls_of(whole)
    check_teacher(teacher, budget)
    assert finish == whole["choices"][0]["finish_reason"]


@CHOICES
@BUDGETS
async def test_streamed_responses_bring_the_same_call(
    client: AsyncOpenAI, budget: float, choice: str
) -> None:
    body = asked(RESPONSES, choice) | {"model": MODEL, "extra_body": {"teacher_budget": budget}}
    whole = (await client.responses.create(**body)).to_dict()
    deltas, last = "", None
    async for event in await client.responses.create(**body, stream=True):
        deltas += event.delta if event.type == "response.function_call_arguments.delta" else ""
        last = event
    assert last.type == "response.completed"
    ((name, arguments),) = calls_of(whole)
    assert calls_of(last.response.to_dict()) == [(name, arguments)]
    assert json.loads(deltas) == arguments
    check_teacher(last.teacher, budget)


@CHOICES
@BUDGETS
async def test_streamed_messages_bring_the_same_call(
    claude: AsyncAnthropic, budget: float, choice: str
) -> None:
    body = asked(MESSAGES, choice) | {"model": MODEL}
    body["extra_body"] = {"teacher_budget": budget, "temperature": body.pop("temperature")}
    whole = (await claude.messages.create(**body)).to_dict()
    async with claude.messages.stream(**body) as stream:
        streamed = (await stream.get_final_message()).to_dict()
    assert calls_of(streamed) == calls_of(whole)
    assert streamed["stop_reason"] == whole["stop_reason"] == "tool_use"


@BUDGETS
async def test_forced_calls_fit_tools_of_many_kinds(client: AsyncOpenAI, budget: float) -> None:
    """A part of the tools; `tests/benchmarks/bench_structured.py` uses all of them."""
    calls = [ask_for_tool(client, tool, budget, place) for place, tool in enumerate(TOOLS[::8])]
    answers = await asyncio.gather(*calls)
    check_all(answers, budget)
