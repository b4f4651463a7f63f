"""Without a router and without a price, the gateway realises the rates that requests ask for."""

import asyncio
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from openai import AsyncOpenAI

from measuring.pair import EXACT, QUIET, START_SECONDS, UNIPROC, Pair, Serving, free_port, gateway_service
from measuring.processes import running
from router.adaptive import MEMORY_TOKENS
from tests.helpers.client import COMMAND_SECONDS, UNHURRIED, chat, excess, metric, openai_client
from tests.helpers.paths import DEMO, ROOT

TAUGHT = 60
"""Number of prompts for `wheels calibrate`, which sends them at least twice at each rate."""
MEASURED = 100
"""Number of completions at each rate after the calibration: some 3,000 tokens."""
AT_ONCE = 8
SPAN_TOKENS = 4
FRACTIONS = (0.05, 0.3)
NEAR = 0.02


async def replies(client: AsyncOpenAI, sources: list[str], fraction: float) -> list[Any]:
    """The replies in the order of the sources, several at a time."""
    places = asyncio.Semaphore(AT_ONCE)

    async def reply(source: str) -> Any:
        async with places:
            return await chat(client, source, fraction)

    return await asyncio.gather(*map(reply, sources))


def completion_tokens(answers: list[Any]) -> int:
    return sum(answer.usage.completion_tokens for answer in answers)


def realised(answers: list[Any]) -> float:
    return sum(answer.teacher["tokens"] for answer in answers) / completion_tokens(answers)


class Aimed(NamedTuple):
    """The metrics of an aimed rate, with the tokens that were learned from before a restart."""

    rate: float
    tokens: float

    @classmethod
    def of(cls, url: str, aim: float) -> "Aimed":
        rate = metric(url, "wheels_realised_rate", aim=f"{aim:g}")
        return cls(rate, metric(url, "wheels_aimed_completion_tokens", aim=f"{aim:g}"))

    def since(self, before: "Aimed", tokens: int) -> float:
        """The rate of the last `tokens` tokens; earlier tokens have faded."""
        faded = before.tokens * math.exp(-tokens / MEMORY_TOKENS)
        return (self.rate * self.tokens - before.rate * faded) / (self.tokens - faded)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join((DEMO / "examples.jsonl").read_text().splitlines()[:TAUGHT]))
    return str(file)


def calibrated(rates: Sequence[float], *arguments: str) -> dict[float, dict[str, Any]]:
    """The rows of `wheels calibrate`, by the rate that was asked for."""
    named = ",".join(map(str, rates))
    options = ("--rates", named, "--temperature", "0", "--concurrency", str(AT_ONCE), "--json")
    done = subprocess.run(
        [sys.executable, "-m", "wheels", "calibrate", *options, *arguments],
        cwd=ROOT,
        env=os.environ | QUIET | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return {row["asked"]: row for row in json.loads(done.stdout)["rows"]}


async def test_calibrated_prices_are_there_at_the_next_start(
    stack: Serving, pair: Pair, sources: list[str], prompts: str, tmp_path: Path
) -> None:
    """No price is configured. The first start knows nothing, and the second goes on from its prices."""
    flags = ("--cache", str(tmp_path / "cache"), *UNHURRIED)
    executor = ("--distributed-executor-backend", UNIPROC, "--kv-cache-memory-bytes", "256M")
    models = ("--student", str(pair.student), "--teacher", stack.teacher)
    rows = calibrated(FRACTIONS, prompts, *models, *flags, "--", *EXACT, *executor)
    for fraction in FRACTIONS:
        assert rows[fraction]["realised"] == pytest.approx(fraction, abs=NEAR)
    assert len(list((tmp_path / "cache" / "prices").iterdir())) == 1

    untrained = Pair(pair.teacher, pair.student, router=None)
    url = f"http://127.0.0.1:{free_port()}"
    with running([gateway_service(untrained, stack.teacher, url, tmp_path, flags)], timeout=START_SECONDS):
        async with openai_client(url) as client:
            for fraction in FRACTIONS:
                before = Aimed.of(url, fraction)
                answers = await replies(client, sources[:MEASURED], fraction)
                assert realised(answers) == pytest.approx(fraction, abs=NEAR), fraction
                assert max(excess(answer, fraction, SPAN_TOKENS) for answer in answers) <= 1e-9
                told = Aimed.of(url, fraction).since(before, completion_tokens(answers))
                assert told == pytest.approx(realised(answers), abs=NEAR)
        rows = calibrated([0.15], prompts, "--gateway", url)
        assert rows[0.15]["realised"] == pytest.approx(0.15, abs=NEAR)
