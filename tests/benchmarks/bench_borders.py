"""Measures how long a completion waits when a span begins or ends.

There are more streams than the student's engine has places, so requests queue. *Continuations first* is the
gateway as it is. *In turn* is the same gateway without priorities: a completion in mid-answer queues after
those that have not begun. Prints the times between the last token of one model and the first of the
other.

    python -m tests.benchmarks.bench_borders
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median, quantiles

from openai import AsyncOpenAI

from measuring.examples import Example, load_examples
from measuring.pair import GATEWAY, HOST, Pair, free_port, gateway_service, teacher_service
from measuring.processes import Service, running
from tests.helpers.paths import ROOT

DEMO = ROOT / "deploy" / "demo"
IN_TURN = (
    sys.executable,
    "-c",
    "import sys, wheels; from server.vllm_api import AsyncLLM; plain = AsyncLLM.generate; "
    "AsyncLLM.generate = lambda *args, **options: plain(*args, **{**options, 'priority': 1}); "
    "sys.exit(wheels.main())",
    "serve",
)


@dataclass
class Waits:
    """Seconds that the requests waited."""

    first: list[float] = field(default_factory=list)
    """Seconds before the first token of each request."""
    border: list[float] = field(default_factory=list)
    """Seconds at every border between the two models."""
    wall: float = 0.0
    """Seconds for all requests together."""

    async def stream(self, client: AsyncOpenAI, example: Example, budget: float) -> None:
        """Make one request, and note its waits."""
        last = time.perf_counter()
        writer: str | None = None
        chunks = await client.chat.completions.create(
            model="wheels",
            messages=[{"role": "user", "content": example.source}],
            temperature=0,
            stream=True,
            extra_body={"teacher_budget": budget},
        )
        async for chunk in chunks:
            if not (chunk.choices and chunk.choices[0].delta.content):
                continue
            now = time.perf_counter()
            source = chunk.model_extra["source"]
            if writer is None:
                self.first.append(now - last)
            elif source != writer:
                self.border.append(now - last)
            last = now
            writer = source

    def __str__(self) -> str:
        p99 = quantiles(self.border, n=100)[98]
        return (
            f"at {len(self.border)} borders p50 {1e3 * median(self.border):.0f} ms, p99 {1e3 * p99:.0f} ms; "
            f"first token p50 {median(self.first):.1f} s; in all {self.wall:.1f} s"
        )


async def measure(url: str, examples: Sequence[Example], budget: float) -> Waits:
    """Request all examples at once; returns their waits."""
    waits = Waits()
    began = time.perf_counter()
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        await asyncio.gather(*(waits.stream(client, example, budget) for example in examples))
    waits.wall = time.perf_counter() - began
    return waits


def gateways(pair: Pair, teacher: str, places: int, logs: Path) -> list[Service]:
    """The gateway as it is, and the one without priorities."""
    services: list[Service] = []
    for name in ("continuations first", "in turn"):
        service = gateway_service(pair, teacher, f"http://{HOST}:{free_port()}", logs, name=name)
        command = (*service.command, "--max-num-seqs", str(places))
        if name == "in turn":
            command = (*IN_TURN, *command[len(GATEWAY) :])
        services.append(replace(service, command=command))
    return services


def compare(both: Sequence[Service], examples: Sequence[Example], budget: float, rounds: int) -> None:
    """Print the waits of every round; one more round, the first, warms up."""
    for turn in range(rounds + 1):
        for gateway in both if turn % 2 else reversed(both):
            time.sleep(1.5)  # the other engine polls for a second after its last step
            url = gateway.ready_url.removesuffix("/ready")
            waits = asyncio.run(measure(url, examples, budget))
            if turn:
                print(f"{gateway.name:<20} {waits}", flush=True)


def main() -> None:
    """Print one line for each gateway and round."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--places", type=int, default=4, help="requests that the engine decodes at once")
    parser.add_argument("--streams", type=int, default=96)
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    pair = Pair.in_directory(DEMO)
    examples = load_examples(DEMO / "examples.jsonl")[: options.streams]
    teacher = f"http://{HOST}:{free_port()}"
    with tempfile.TemporaryDirectory() as logs:
        both = gateways(pair, teacher, options.places, Path(logs))
        services = [teacher_service(pair.teacher, teacher, Path(logs)), *both]
        with running(services, timeout=600):
            compare(both, examples, options.budget, options.rounds)


if __name__ == "__main__":
    main()
