"""A hundred schemas and fifty tools over two models, at several budgets: every answer has to validate.

An answer that `max_tokens` cuts is counted apart, and so is a schema that vLLM itself refuses. With `--speed`
the student's JSON is timed instead, by the gateway at budget 0 and by a stock server in turns.

    python -m tests.benchmarks.bench_structured --student STUDENT --teacher TEACHER
    python -m tests.benchmarks.bench_structured --student STUDENT --speed 8
"""

import argparse
import asyncio
import collections
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from openai import AsyncOpenAI, BadRequestError

from measuring.pair import HOST, Pair, Serving, free_port, gateway_service, teacher_service
from measuring.processes import running
from tests.helpers.client import UNHURRIED
from tests.helpers.paths import DEMO
from tests.helpers.schemas import REAL, SCHEMAS, TOOLS
from tests.helpers.structured import Answer, ask_for_schema, ask_for_tool

BUDGETS = (0.0, 0.2, 1.0)
CONCURRENCY = 16
CONTEXT = 1024
"""Longest context in tokens: requests here are short."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", type=Path, default=DEMO / "student")
    parser.add_argument("--teacher", type=Path, default=DEMO / "teacher")
    parser.add_argument("--schemas", type=int, default=len(SCHEMAS), help="how many, evenly chosen")
    parser.add_argument("--tools", type=int, default=len(TOOLS), help="how many, evenly chosen")
    parser.add_argument("--parser", default="hermes", help="tool call parser of the gateway")
    parser.add_argument("--white-space", action="store_true", help="let grammars of JSON allow any of it")
    parser.add_argument("--gate", default="margin")
    parser.add_argument("--ask-tokens", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=150)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--speed", type=int, default=0, metavar="ROUNDS")
    arguments = parser.parse_args(argv)
    teacher = arguments.student if arguments.speed else arguments.teacher
    with started(Pair(teacher, arguments.student, router=None), arguments) as servers:
        if arguments.speed:
            asyncio.run(compare_speed(servers, arguments.speed, arguments.max_tokens))
            return 0
        return 1 if asyncio.run(measure(servers.gateway, arguments)) else 0


@contextmanager
def started(pair: Pair, arguments: argparse.Namespace) -> Iterator[Serving]:
    """A stock server of the teacher, and a gateway; both with the same settings for grammars."""
    grammar = {"backend": "xgrammar", "disable_any_whitespace": not arguments.white_space}
    tools = {"enable-auto-tool-choice": True, "tool-call-parser": arguments.parser}
    stock = ("--structured-outputs-config", json.dumps(grammar), "--max-model-len", context(pair.teacher))
    settings = {"structured-outputs-config": grammar, "max-model-len": int(context(pair.student)), **tools}
    ask = str(arguments.ask_tokens)
    flags = ("--ask-tokens", ask, "--span-tokens", str(max(4, arguments.ask_tokens)))
    teacher, gateway = (f"http://{HOST}:{free_port()}" for _ in range(2))
    with tempfile.TemporaryDirectory() as directory:
        logs = Path(directory)
        config = logs / "gateway.yaml"
        config.write_text(yaml.safe_dump({"vllm": settings}))
        flags += (*UNHURRIED, "--gate", arguments.gate, "--config", str(config))
        services = (
            teacher_service(pair.teacher, teacher, logs, flags=stock),
            gateway_service(pair, teacher, gateway, logs, flags),
        )
        with running(services, timeout=600) as (teacher_process, gateway_process):
            yield Serving(teacher, gateway, teacher_process, gateway_process)


def context(model: Path) -> str:
    longest = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    return str(min(CONTEXT, longest))


def some(of: Sequence[Any], number: int) -> list[Any]:
    """This many elements, spread over the whole sequence."""
    return [of[place * len(of) // number] for place in range(number)]


async def measure(url: str, arguments: argparse.Namespace) -> int:
    """Prints a line for each budget; returns how many answers are not valid."""
    invalid = 0
    schemas = some(SCHEMAS, arguments.schemas)
    tools = some(TOOLS, arguments.tools)
    print("| what | budget | valid | invalid | cut | refused | teacher tokens | seconds |", flush=True)
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        for budget in arguments.budgets:
            most = arguments.max_tokens
            calls = [ask_for_schema(client, schema, budget, n, most) for n, schema in enumerate(schemas)]
            invalid += await report("schemas", budget, calls)
            calls = [ask_for_tool(client, tool, budget, n, most) for n, tool in enumerate(tools)]
            invalid += await report("tools", budget, calls)
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


async def report(what: str, budget: float, calls: Sequence[Awaitable[Answer]]) -> int:
    """Prints the outcomes of the calls; returns how many answers are not valid."""
    started = time.monotonic()
    answers = await together(calls)
    seconds = time.monotonic() - started
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
        if fault:
            kind = "cut" if answer.cut else "invalid"
            print(f"  {kind} {what} {index}: {fault[:160]} in {answer.text[:300]!r}", flush=True)
    row = [what, budget, counts["valid"], counts["invalid"], counts["cut"], counts["refused"]]
    print("|", " | ".join(map(str, [*row, f"{teacher} of {tokens}", f"{seconds:.0f}"])), "|", flush=True)
    return counts["invalid"]


async def compare_speed(servers: Serving, rounds: int, max_tokens: int) -> None:
    """Prints how fast the gateway writes JSON at budget 0, compared with a stock server; round by round."""
    urls = {"gateway": servers.gateway, "teacher": servers.teacher}
    ratios = []
    for number in range(rounds + 1):
        speed = {}
        for side in sorted(urls, reverse=number % 2 == 1):
            speed[side] = await json_speed(urls[side], side == "gateway", max_tokens)
        if number:  # not in the first round, in which both compile the grammars
            ratios.append(speed["gateway"] / speed["teacher"])
            print(f"gateway {speed['gateway']:.1f}, stock {speed['teacher']:.1f} tokens/s", flush=True)
    low, high = min(ratios), max(ratios)
    print(f"gateway / stock: median {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})", flush=True)


async def json_speed(url: str, gateway: bool, max_tokens: int) -> float:
    """Completion tokens per second of sixty requests for JSON; both sides write the same."""
    room = asyncio.Semaphore(CONCURRENCY)
    budget = {"teacher_budget": 0} if gateway else {}

    async def one(client: AsyncOpenAI, schema: dict[str, Any]) -> int:
        async with room:
            reply = await client.chat.completions.create(
                model="wheels" if gateway else "teacher",
                messages=[{"role": "user", "content": "Give an example."}],
                response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
                max_tokens=max_tokens,
                temperature=0,
                extra_body=budget,
            )
            return int(reply.usage.completion_tokens)

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        started = time.monotonic()
        tokens = await asyncio.gather(*(one(client, schema) for schema in REAL * 4))
        return sum(tokens) / (time.monotonic() - started)


if __name__ == "__main__":
    raise SystemExit(main())
