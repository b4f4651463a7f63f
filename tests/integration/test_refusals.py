"""Failed requests as clients see them: before the first token or after it, streamed or not."""

import signal
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from measuring.pair import Pair, Serving, serving
from tests.helpers.client import MODEL, PATIENCE, openai_client

CHAT, COMPLETIONS, RESPONSES, MESSAGES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
)
SURFACES = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)
FLAGS = (
    "--gate",
    "random",
    *("--on-teacher-error", "error", "--teacher-timeout", "1", "--span-timeout", "1"),
    # The gateway must not notice by its own probes that the teacher is away.
    *("--teacher-probe", "3600", "--breaker-failures", "1000"),
)


def body(path: str, source: str, **more: Any) -> dict[str, Any]:
    asked = [{"role": "user", "content": source}]
    question = {
        CHAT: {"messages": asked, "max_tokens": 96},
        COMPLETIONS: {"prompt": source, "max_tokens": 96},
        RESPONSES: {"input": source, "max_output_tokens": 96},
        MESSAGES: {"messages": asked, "max_tokens": 96},
    }[path]
    return {"model": MODEL, "temperature": 0} | question | more


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=PATIENCE) as client:
        yield client


@pytest.fixture(scope="module")
def strict(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A gateway that fails with its teacher, and a teacher that has stopped."""
    with serving(pair, tmp_path_factory.mktemp("strict"), flags=FLAGS) as stack:
        stack.teacher_process.signal(signal.SIGSTOP)
        try:
            yield stack
        finally:
            stack.teacher_process.signal(signal.SIGCONT)


@pytest.fixture
async def gpt(strict: Serving) -> AsyncIterator[AsyncOpenAI]:
    async with openai_client(strict.gateway) as client:
        yield client


@pytest.fixture
async def claude(strict: Serving) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(
        base_url=strict.gateway, api_key="none", max_retries=0, timeout=PATIENCE
    ) as client:
        yield client


async def read(
    gpt: AsyncOpenAI, claude: AsyncAnthropic, path: str, source: str, budget: float, seen: list[Any]
) -> None:
    """Collect the events of a stream, by the official client of the surface."""
    asked = body(path, source, stream=True)
    asked["extra_body"] = {"teacher_budget": budget, "temperature": asked.pop("temperature")}
    create: dict[str, Callable[..., Any]] = {
        CHAT: gpt.chat.completions.create,
        COMPLETIONS: gpt.completions.create,
        RESPONSES: gpt.responses.create,
        MESSAGES: claude.messages.create,
    }
    async for event in await create[path](**asked):
        seen.append(event)


@pytest.mark.parametrize("path", SURFACES)
async def test_a_stream_that_loses_its_teacher_ends_with_an_error(
    gpt: AsyncOpenAI, claude: AsyncAnthropic, sources: list[str], path: str
) -> None:
    expected = anthropic.APIStatusError if path == MESSAGES else openai.APIError
    seen: list[Any] = []
    for source in sources[:30]:  # the student may ask before its first token, or end without asking
        seen.clear()
        try:
            await read(gpt, claude, path, source, 0.5, seen)
        except expected as error:
            lost: Exception = error
            if seen:
                break
    else:
        pytest.fail("no stream began and then lost its teacher")
    assert "The teacher did not answer in time" in str(lost)
    assert not isinstance(lost, openai.APIConnectionError | openai.APIStatusError)
    assert getattr(lost, "status_code", 200) == 200


@pytest.mark.parametrize("path", SURFACES)
async def test_a_stream_that_has_not_begun_is_refused(
    gpt: AsyncOpenAI, claude: AsyncAnthropic, sources: list[str], path: str
) -> None:
    client = anthropic if path == MESSAGES else openai
    with pytest.raises(client.InternalServerError, match="The teacher did not answer in time") as error:
        await read(gpt, claude, path, sources[6], 1, [])
    assert error.value.status_code == 502


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", SURFACES)
def test_the_error_for_a_lost_teacher_has_the_shape_of_the_api(
    http: httpx.Client, strict: Serving, sources: list[str], path: str, stream: bool
) -> None:
    asked = body(path, sources[6], stream=stream, teacher_budget=1)
    reply = http.post(strict.gateway + path, json=asked, headers={"X-Request-Id": "order-7"})
    assert reply.status_code == 502
    answer = reply.json()
    if path == MESSAGES:
        assert answer.keys() == {"type", "error", "request_id"}
        assert (answer["type"], answer["error"]["type"], answer["request_id"]) == (
            "error",
            "api_error",
            "order-7",
        )
    else:
        assert (answer["error"]["type"], answer["error"]["code"]) == ("Bad Gateway", 502)


# Parameters as a client sends them, and their names in the refusal.
REFUSED = [
    (CHAT, {"presence_penalty": 1, "repetition_penalty": 1.2}, "presence_penalty"),
    (COMPLETIONS, {"frequency_penalty": 1, "repetition_penalty": 1.2}, "frequency_penalty"),
    (RESPONSES, {"presence_penalty": 1, "repetition_penalty": 1.2}, "presence_penalty"),
    (RESPONSES, {"teacher_budget": 2}, "teacher_budget"),
    *((path, {"teacher_budget": 2}, "teacher_budget") for path in SURFACES),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "more", "param"), REFUSED)
def test_a_refusal_names_the_parameter_as_it_was_sent(
    http: httpx.Client, stack: Serving, path: str, more: dict[str, Any], param: str, stream: bool
) -> None:
    reply = http.post(stack.gateway + path, json=body(path, "x", stream=stream, teacher_budget=0.5) | more)
    assert reply.status_code == 400, reply.text
    answer = reply.json()
    if path == MESSAGES:
        assert answer["error"]["type"] == "invalid_request_error"
        assert param in answer["error"]["message"]
    else:
        assert answer["error"]["param"] == param
        assert param in answer["error"]["message"]


BODIES = {
    "NaN": b'{"model": "wheels", "temperature": NaN, %s}',
    "1e999": b'{"model": "wheels", "temperature": 1e999, %s}',
    "half a character": b'{"model": "wheels", "user": "\\ud800", %s}',
    "in a name": b'{"model": "wheels", "metadata": {"\\ud800": "x"}, %s}',
    "bad UTF-8": b'{"model": "wheels", "user": "\xff", %s}',
    "a long number": b'{"model": "wheels", "seed": ' + b"1" * 5000 + b", %s}",
    "deep": b'{"model": "wheels", "x": ' + b"[" * 300 + b"]" * 300 + b", %s}",
    "very deep": b'{"model": "wheels", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b", %s}",
    "cut": b'{"model": "wheels", %s',
}


@pytest.mark.parametrize("budget", [None, 0, 0.5, 1])
@pytest.mark.parametrize("path", SURFACES)
def test_a_body_that_is_not_json_is_refused_at_every_budget(
    http: httpx.Client, stack: Serving, path: str, budget: float | None
) -> None:
    more = {} if budget is None else {"teacher_budget": budget}
    question = {k: v for k, v in body(path, "x", **more).items() if k not in ("model", "temperature")}
    rest = httpx.Request("POST", "http://x", json=question).content[1:-1]
    for name, template in BODIES.items():
        reply = http.post(
            stack.gateway + path,
            content=template.replace(b"%s", rest),
            headers={"Content-Type": "application/json"},
        )
        assert reply.status_code == 400, (name, reply.text)
        error = reply.json()["error"]
        assert error["type"] == ("invalid_request_error" if path == MESSAGES else "BadRequestError"), name
