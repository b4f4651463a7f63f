"""A hundred schemas and fifty tools over two models, at several budgets: every answer has to validate.

An answer that `max_tokens` cuts is counted apart, and so is a schema that vLLM itself refuses.

    python -m tests.benchmarks.bench_structured --student STUDENT --teacher TEACHER
"""

import argparse
import asyncio
import collections
import tempfile
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, BadRequestError

from server.local.pair import Pair, serving
from tests.helpers.paths import DEMO
from tests.helpers.schemas import SCHEMAS, TOOLS
from tests.helpers.structured import Answer, ask_for_schema, ask_for_tool

BUDGETS = (0.0, 0.2, 1.0)
CONCURRENCY = 16


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", type=Path, default=DEMO / "student")
    parser.add_argument("--teacher", type=Path, default=DEMO / "teacher")
    parser.add_argument("--schemas", type=int, default=len(SCHEMAS))
    parser.add_argument("--tools", type=int, default=len(TOOLS))
    parser.add_argument("--ask-tokens", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    arguments = parser.parse_args(argv)
    flags = ("--ask-tokens", str(arguments.ask_tokens), "--span-tokens", str(max(4, arguments.ask_tokens)))
    pair = Pair(arguments.teacher, arguments.student, router=None)
    with tempfile.TemporaryDirectory() as logs, serving(pair, Path(logs), flags=flags) as stack:
        invalid = asyncio.run(measure(stack.gateway, arguments))
    return 1 if invalid else 0


async def measure(url: str, arguments: argparse.Namespace) -> int:
    """Prints a line for each budget; returns how many answers are not valid."""
    invalid = 0
    print("| what | budget | valid | invalid | cut | refused | teacher tokens | seconds |", flush=True)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        for budget in arguments.budgets:
            for what, calls in (
                (
                    "schemas",
                    [
                        ask_for_schema(client, schema, budget, index, arguments.max_tokens)
                        for index, schema in enumerate(SCHEMAS[: arguments.schemas])
                    ],
                ),
                (
                    "tools",
                    [
                        ask_for_tool(client, tool, budget, index, arguments.max_tokens)
                        for index, tool in enumerate(TOOLS[: arguments.tools])
                    ],
                ),
            ):
                started = time.monotonic()
                answers = await together(calls)
                invalid += report(what, budget, answers, time.monotonic() - started)
    return invalid


async def together(calls: Sequence[Awaitable[Answer]]) -> list[Answer | BadRequestError]:
    room = asyncio.Semaphore(CONCURRENCY)

    async def one(call: Awaitable[Answer]) -> Answer | BadRequestError:
        async with room:
            try:
                return await call
            except BadRequestError as error:
                return error

    return await asyncio.gather(*map(one, calls))


def report(what: str, budget: float, answers: Sequence[Any], seconds: float) -> int:
    counts = collections.Counter()
    tokens = teacher = 0
    for index, answer in enumerate(answers):
        if isinstance(answer, BadRequestError):
            counts["refused"] += 1
            print(f"  refused {what} {index}: {answer.message[:160]}", flush=True)
            continue
        tokens += answer.tokens
        teacher += answer.teacher["tokens"]
        fault = answer.fault()
        counts["cut" if answer.cut else "invalid" if fault else "valid"] += 1
        if fault and not answer.cut:
            print(f"  invalid {what} {index}: {fault[:160]} in {answer.text[:300]!r}", flush=True)
    row = [what, budget, counts["valid"], counts["invalid"], counts["cut"], counts["refused"]]
    print("|", " | ".join(map(str, [*row, f"{teacher} of {tokens}", f"{seconds:.0f}"])), "|", flush=True)
    return counts["invalid"]


if __name__ == "__main__":
    raise SystemExit(main())
