"""Short calls with which integration tests ask a gateway and read its replies and metrics."""

import asyncio
import re
import urllib.request
from collections.abc import Callable
from typing import Any

from openai import AsyncOpenAI

MODEL = "wheels"
PRICES = {"student": {"input": 0.1, "output": 0.4}, "teacher": {"input": 2, "output": 10}}
"""Prices of the shared gateway. Cached tokens cost the same, so a reply's cost follows from its usage."""
PATIENCE = 600
"""Seconds that a client waits: next to other programs an engine is slow. Tests have a limit of their own."""
COMMAND_SECONDS = 1500
"""Longest time of a whole command that starts engines, such as training from a gateway."""
UNHURRIED = ("--teacher-timeout", "600", "--span-timeout", "600", "--teacher-queue", "600")
"""Flags of a gateway for tests that are not about time: its teacher may be slow on a busy machine."""


def openai_client(url: str) -> AsyncOpenAI:
    """The official client without retries, so that every failure shows."""
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)


async def chat(client: AsyncOpenAI, source: str, budget: Any = None, **parameters: Any) -> Any:
    """One chat completion at temperature 0, with token ids; ``budget`` None sends no teacher_budget."""
    extra = {"return_token_ids": True} | parameters.pop("extra_body", {})
    if budget is not None:
        extra["teacher_budget"] = budget
    parameters = {"model": MODEL, "temperature": 0, "max_tokens": 96} | parameters
    return await client.chat.completions.create(
        messages=[{"role": "user", "content": source}], extra_body=extra, **parameters
    )


def source_of_tokens(reply: Any, choice: int = 0) -> list[bool]:
    """For each token of a choice, whether the teacher wrote it."""
    report = reply.choices[choice].teacher if len(reply.choices) > 1 else reply.teacher
    ids = reply.choices[choice].token_ids
    by_teacher = [False] * len(ids)
    for start, end in report["spans"]:
        by_teacher[start:end] = [True] * (end - start)
    return by_teacher


def excess(reply: Any, fraction: float, span_tokens: int) -> float:
    """Largest number of tokens by which a prefix of the completion is above its bound."""
    spent, worst = 0, 0.0
    for length, by_teacher in enumerate(source_of_tokens(reply), start=1):
        spent += by_teacher
        worst = max(worst, spent - fraction * length - span_tokens)
    return worst


def metric(url: str, name: str, key: str | None = None, **labels: str) -> float:
    """Sum of a metric's series that have these labels; with tenants, an admin's ``key`` is needed."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{url}/metrics", headers=headers)
    text = urllib.request.urlopen(request, timeout=PATIENCE).read().decode()
    total = 0.0
    for line in text.splitlines():
        match = re.fullmatch(rf"{re.escape(name)}(?:{{(.*)}})? (\S+)", line)
        if match and all(f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()):
            total += float(match[2])
    return total


async def eventually(true: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until a condition is true, at most for ``seconds``; a test that needs it fails afterwards."""
    for _ in range(int(seconds * 5)):
        if true():
            return
        await asyncio.sleep(0.2)


async def settled(
    url: str, name: str, value: float, seconds: float = 60, key: str | None = None, **labels: str
) -> float:
    """Wait until a metric has reached a value; returns the metric's last value."""
    for _ in range(int(seconds * 10)):
        if metric(url, name, key, **labels) == value:
            break
        await asyncio.sleep(0.1)
    return metric(url, name, key, **labels)
