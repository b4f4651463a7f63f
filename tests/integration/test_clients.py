"""Official clients without changes, with a budget and without, used as the documents show."""

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic

from measuring.pair import Serving
from tests.helpers.client import MODEL, PATIENCE, metric
from tests.helpers.paths import ROOT


@pytest.fixture
async def claude(stack: Serving) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(
        base_url=stack.gateway, api_key="none", max_retries=0, timeout=PATIENCE
    ) as client:
        yield client


def asked(source: str, **extra: Any) -> dict[str, Any]:
    message = {"role": "user", "content": source}
    return {"model": MODEL, "max_tokens": 96, "messages": [message], "extra_body": {"temperature": 0} | extra}


@pytest.mark.parametrize("budget", [None, 0, 0.5, 1])
async def test_anthropics_client_works_at_every_budget(
    claude: AsyncAnthropic, sources: list[str], budget: float | None
) -> None:
    request = asked(sources[6], **({} if budget is None else {"teacher_budget": budget}))
    whole = await claude.messages.create(**request)
    assert whole.stop_reason == "end_turn"
    report = whole.teacher
    assert report["tokens"] <= whole.usage.output_tokens
    assert (report["tokens"] == 0) == (budget == 0)
    async with claude.messages.stream(**request) as stream:
        events = [event async for event in stream]
        streamed = await stream.get_final_message()
    assert streamed.content[0].text == whole.content[0].text
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    (last,) = [event for event in events if event.type == "message_delta"]
    assert last.teacher == report
    authors = {event.source for event in events if event.type == "content_block_delta"}
    assert authors == {0: {"student"}, 1: {"teacher"}}.get(budget, {"student", "teacher"})


async def test_anthropics_client_gets_errors_in_its_own_form(
    claude: AsyncAnthropic, sources: list[str]
) -> None:
    with pytest.raises(anthropic.BadRequestError, match=r"teacher_budget\.fraction"):
        await claude.messages.create(**asked(sources[0], teacher_budget=2))
    with pytest.raises(anthropic.NotFoundError, match="no-model"):
        await claude.messages.create(**(asked(sources[0], teacher_budget=0.5) | {"model": "no-model"}))


async def test_anthropics_client_can_count_tokens(claude: AsyncAnthropic, sources: list[str]) -> None:
    request = asked(sources[0])
    counted = await claude.messages.count_tokens(model=MODEL, messages=request["messages"])
    assert counted.input_tokens == (await claude.messages.create(**request)).usage.input_tokens


@pytest.mark.parametrize("package", ["openai", "anthropic"])
async def test_the_examples_in_the_documents_run(stack: Serving, package: str) -> None:
    page = (ROOT / "docs" / "clients.md").read_text()
    (example,) = re.findall(rf"```python\n(from {package} import .*?)```", page, re.DOTALL)
    code = example.replace("http://127.0.0.1:8000", stack.gateway)
    before = metric(stack.gateway, "wheels_requests_total")
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    printed, _ = await process.communicate()
    assert process.returncode == 0
    assert b"'spans'" in printed
    assert metric(stack.gateway, "wheels_requests_total") == before + 1
