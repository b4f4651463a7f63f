"""Compares two ways to spend a global limit on real engines.

The shipped pair gets held-out sentences in an order that shifts from few digits to many and back to a
mixture. Every request has a budget of its own. Together these are more than the limit. *Controller* is the
gateway as it is. *First come* is the same gateway without its controller: the ledger alone holds the limit.

    python -m tests.benchmarks.bench_shared
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import httpx

from measuring.examples import Example, load_examples
from measuring.gateway import GatewayClient
from measuring.pair import GATEWAY, HOST, START_SECONDS, Pair, free_port, gateway_service, teacher_service
from measuring.processes import Service, running
from server.local.measure import BudgetResult, answer_all
from tests.helpers.paths import ROOT

DEMO = ROOT / "deploy" / "demo"
FIRST_COME = (
    sys.executable,
    "-c",
    "import sys, wheels; from router.controller import PriceController; "
    "PriceController.rate = lambda *_: 1.0; sys.exit(wheels.main())",
    "serve",
)
OWN = 0.5
"""Fraction of every request's own budget."""


def digits(example: Example) -> int:
    """Number of digits in an example's source."""
    return sum(map(str.isdigit, example.source))


def shifting(examples: Sequence[Example], rounds: int) -> list[Example]:
    """The third with the fewest digits, the third with the most, then all in order; ``rounds`` times."""
    by_digits = sorted(examples, key=digits)
    third = len(examples) // 3
    return (by_digits[:third] + by_digits[-third:] + list(examples)) * rounds


async def watch(url: str, window: float, rates: list[float]) -> None:
    """Note the teacher rate over the limit's window once a second, after the first window."""
    async with httpx.AsyncClient(base_url=url) as http:
        await asyncio.sleep(window)
        while True:
            (budget,) = (await http.get("/budgets")).json()["budgets"]
            rates.append(budget["rate"])
            await asyncio.sleep(1.0)


class SharedResult(NamedTuple):
    """The result of one gateway under the limit."""

    result: BudgetResult
    rates: list[float]
    """Teacher rates over the limit's window."""


async def measure(url: str, examples: Sequence[Example], window: float, streams: int) -> SharedResult:
    """Request all examples while the limit is watched."""
    rates: list[float] = []
    watching = asyncio.create_task(watch(url, window, rates))
    async with GatewayClient(url, concurrency=streams) as client:
        start = time.perf_counter()
        answered = await answer_all(client, examples, OWN)
        seconds = time.perf_counter() - start
    watching.cancel()
    result = BudgetResult.from_answers(answered, budget=OWN, span_tokens=4, seconds=seconds)
    return SharedResult(result, rates)


def gateways(pair: Pair, teacher: str, flags: Sequence[str], logs: Path) -> list[Service]:
    """The gateway without its controller, and the gateway as it is."""
    services: list[Service] = []
    for name in ("first come", "controller"):
        service = gateway_service(pair, teacher, f"http://{HOST}:{free_port()}", logs, flags, name)
        if name == "first come":
            service = replace(service, command=(*FIRST_COME, *service.command[len(GATEWAY) :]))
        services.append(service)
    return services


def main() -> None:
    """Print one line for each gateway."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--window", type=float, default=20.0, help="seconds")
    parser.add_argument("--rounds", type=int, default=1, help="of 332 requests")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument(
        "--aim", choices=("quality", "rate"), default="quality", help="of a request's own budget"
    )
    options = parser.parse_args()
    pair = Pair.in_directory(DEMO)
    traffic = shifting(load_examples(DEMO / "examples.jsonl"), options.rounds)
    limit = {"type": "fraction", "fraction": options.rate, "window_seconds": options.window}
    flags = ("--limits", json.dumps([limit]), "--aim", options.aim)
    teacher = f"http://{HOST}:{free_port()}"
    with tempfile.TemporaryDirectory() as logs:
        both = gateways(pair, teacher, flags, Path(logs))
        services = [teacher_service(pair.teacher, teacher, Path(logs)), *both]
        with running(services, timeout=2 * START_SECONDS):
            print(
                f"| a limit of {options.rate:.0%} over {options.window:g} s | exact match | edit similarity "
                "| teacher rate | over a window |"
            )
            for gateway in both:
                url = gateway.ready_url.removesuffix("/ready")
                measured = asyncio.run(measure(url, traffic, options.window, options.streams))
                result = measured.result
                print(
                    f"| {gateway.name} | {result.exact_match:.1%} | {result.similarity:.4f} "
                    f"| {result.teacher_rate:.2%} | {min(measured.rates):.2%} to {max(measured.rates):.2%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
