"""Structured output that two models write: through every endpoint, at every budget, streamed or not."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

import jsonschema
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI, BadRequestError

from measuring.pair import HOST, START_SECONDS, Pair, Serving, free_port, gateway_service
from measuring.processes import running
from tests.helpers.client import MODEL, PATIENCE, openai_client
from tests.helpers.schemas import SCHEMAS, SHORT, SMALL, record
from tests.helpers.structured import ask_for_schema, check_all

# The shipped models do not know JSON, and would fill it with spaces.
CONFIG = """
vllm:
  structured-outputs-config: {backend: xgrammar, disable_any_whitespace: true}
"""
SCHEMA = record({"name": SHORT, "colour": {"enum": ["red", "green"]}, "age": SMALL})
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
BUDGETS = pytest.mark.parametrize("budget", [0, 0.2, 1])
STREAMS = pytest.mark.parametrize("stream", [False, True])
LIMITS = {"max_tokens": 250, "temperature": 1.0}
QUESTION = [{"role": "user", "content": "Anna is 42."}]


class Written(NamedTuple):
    text: str
    teacher: dict[str, Any]


@pytest.fixture(scope="module")
def url(stack: Serving, pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of another gateway with the same teacher, which asks at random."""
    directory = tmp_path_factory.mktemp("structured")
    config = directory / "gateway.yaml"
    config.write_text(CONFIG)
    gateway = f"http://{HOST}:{free_port()}"
    flags = ("--gate", "random", "--config", str(config))
    with running([gateway_service(pair, stack.teacher, gateway, directory, flags)], timeout=START_SECONDS):
        yield gateway


@pytest.fixture
async def client(url: str) -> AsyncIterator[AsyncOpenAI]:
    async with openai_client(url) as client:
        yield client


@pytest.fixture
async def claude(url: str) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE) as claude:
        yield claude


async def chat(client: AsyncOpenAI, budget: float, *, stream: bool = False, **more: Any) -> Written:
    """The result of a chat."""
    extra = {"teacher_budget": budget} | more.pop("extra_body", {})
    asked = {"model": MODEL, "messages": QUESTION, "seed": 3, "stream": stream} | LIMITS | more
    reply = await client.chat.completions.create(extra_body=extra, **asked)
    if not stream:
        return Written(reply.choices[0].message.content, reply.teacher)
    text, teacher = "", {}
    async for chunk in reply:
        teacher = getattr(chunk, "teacher", None) or teacher
        for choice in chunk.choices:
            text += choice.delta.content or ""
    return Written(text, teacher)


def check(written: Written, budget: float) -> None:
    jsonschema.validate(json.loads(written.text), SCHEMA)
    tokens = written.teacher["tokens"]
    assert tokens > 0 if budget == 1 else tokens == 0 or budget > 0
    assert written.teacher["denied"].keys() <= {"budget"}


@STREAMS
@BUDGETS
async def test_chats_follow_a_response_format(client: AsyncOpenAI, budget: float, stream: bool) -> None:
    check(await chat(client, budget, stream=stream, response_format=FORMAT), budget)


GRAMMARS = {
    "choice": {"choice": ["yes", "no", "perhaps"]},
    "regex": {"regex": "(yes|no), [0-9]{3}"},
    "grammar": {"grammar": 'root ::= "yes" | "no" | "perhaps" more\nmore ::= "!" | "?"'},
    "json": {"json": SCHEMA},
    "json_object": {"json_object": True},
}
FITS = re.compile(r"(yes|no|perhaps)(, [0-9]{3})?[!?]?")


@STREAMS
@BUDGETS
@pytest.mark.parametrize("kind", GRAMMARS)
async def test_completions_follow_every_kind_of_grammar(
    client: AsyncOpenAI, budget: float, stream: bool, kind: str
) -> None:
    extra = {"teacher_budget": budget, "structured_outputs": GRAMMARS[kind]}
    asked = {"model": MODEL, "prompt": "Well?", "seed": 4, "stream": stream} | LIMITS
    reply = await client.completions.create(extra_body=extra, **asked)
    chunks = [choice async for chunk in reply for choice in chunk.choices] if stream else reply.choices
    text, ending = "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason
    if kind == "json":
        jsonschema.validate(json.loads(text), SCHEMA)
    elif kind == "json_object":
        assert text.startswith("{")
        assert ending == "length" or isinstance(json.loads(text), dict)
    else:
        assert FITS.fullmatch(text)


@STREAMS
@BUDGETS
async def test_responses_follow_a_text_format(client: AsyncOpenAI, budget: float, stream: bool) -> None:
    reply = await client.responses.create(
        model=MODEL,
        input="Anna is 42.",
        text={"format": {"type": "json_schema", "name": "person", "schema": SCHEMA}},
        max_output_tokens=250,
        stream=stream,
        extra_body={"teacher_budget": budget},
    )
    if not stream:
        check(Written(reply.output_text, reply.teacher), budget)
        return
    events = [event async for event in reply]
    event = events[-1]
    assert event.type == "response.completed"
    check(Written(event.response.output_text, event.teacher), budget)


@STREAMS
@BUDGETS
async def test_messages_follow_an_output_format(claude: AsyncAnthropic, budget: float, stream: bool) -> None:
    form = {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
    asked = {"model": MODEL, "messages": QUESTION, "max_tokens": 250}
    reply = await claude.messages.create(stream=stream, extra_body={"teacher_budget": budget} | form, **asked)
    if not stream:
        check(Written(reply.content[0].text, reply.teacher), budget)
        return
    text, teacher = "", {}
    async for event in reply:
        teacher = getattr(event, "teacher", None) or teacher
        if event.type == "content_block_delta":
            text += event.delta.text
    check(Written(text, teacher), budget)


@BUDGETS
async def test_answers_fit_schemas_of_many_kinds(client: AsyncOpenAI, budget: float) -> None:
    """A part of the schemas; `tests/benchmarks/bench_structured.py` uses all of them."""
    asked = [ask_for_schema(client, schema, budget, place) for place, schema in enumerate(SCHEMAS[::12])]
    answers = await asyncio.gather(*asked)
    check_all(answers, budget)


async def test_a_grammar_works_with_choices_log_probabilities_and_a_stop_string(client: AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        response_format=FORMAT,
        n=2,
        seed=5,
        logprobs=True,
        top_logprobs=2,
        stop=[',"age'],
        extra_body={"teacher_budget": 0.5},
        **LIMITS,
    )
    for choice in reply.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content + "}"), {"required": ["name", "colour"]})
        assert len(choice.logprobs.content) > 5


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"type": "string", "pattern": "("}])
async def test_a_bad_schema_gets_the_refusal_of_vllm(client: AsyncOpenAI, schema: Any) -> None:
    messages = []
    for budget in (0, 0.2, 1):
        extra = {"structured_outputs": {"json": schema}}
        with pytest.raises(BadRequestError) as error:
            await chat(client, budget, extra_body=extra)
        messages.append(re.sub(r"\d\d:\d\d:\d\d", "TIME", error.value.message))
    assert len(set(messages)) == 1
