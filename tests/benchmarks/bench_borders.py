"""How long a completion waits where a span begins or ends: python -m tests.benchmarks.bench_borders

More streams than the student's engine has places, so that requests queue. *continuations first*: the gateway
as it is. *in turn*: the same one without priorities, so that a completion in mid-answer queues behind those
that have not begun. Prints the times between the last token of one model and the first of the other.
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

from server.local.measure import Example, load_examples
from server.local.pair import GATEWAY, HOST, Pair, free_port, gateway_service, teacher_service
from server.local.processes import Service, running

DEMO = Path(__file__).parents[2] / "deploy" / "demo"
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
    """Seconds: before the first token of each request, at every border, in all."""

    first: list[float] = field(default_factory=list)
    border: list[float] = field(default_factory=list)
    wall: float = 0.0

    async def stream(self, client: AsyncOpenAI, example: Example, budget: float) -> None:
        last, source = time.perf_counter(), None
        chunks = await client.chat.completions.create(
            model="wheels", messages=[{"role": "user", "content": example.source}], temperature=0,
            stream=True, extra_body={"teacher_budget": budget},
        )  # fmt: skip
        async for chunk in chunks:
            if not (chunk.choices and chunk.choices[0].delta.content):
                continue
            now, writes = time.perf_counter(), chunk.model_extra["source"]
            if writes != source:
                (self.first if source is None else self.border).append(now - last)
            last, source = now, writes


async def measure(url: str, examples: Sequence[Example], budget: float) -> Waits:
    waits, began = Waits(), time.perf_counter()
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        await asyncio.gather(*(waits.stream(client, example, budget) for example in examples))
    waits.wall = time.perf_counter() - began
    return waits


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--places", type=int, default=4, help="requests that the engine decodes at once")
    parser.add_argument("--streams", type=int, default=96)
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    pair, examples = Pair.in_directory(DEMO), load_examples(DEMO / "examples.jsonl")[: options.streams]
    teacher = f"http://{HOST}:{free_port()}"
    urls = {name: f"http://{HOST}:{free_port()}" for name in ("continuations first", "in turn")}
    with tempfile.TemporaryDirectory() as logs:
        services: list[Service] = [teacher_service(pair.teacher, teacher, Path(logs))]
        for name, url in urls.items():
            service = gateway_service(pair, teacher, url, Path(logs))
            command = (*service.command, "--max-num-seqs", str(options.places))
            if name == "in turn":
                command = (*IN_TURN, *command[len(GATEWAY) :])
            services.append(replace(service, name=name, log=Path(logs) / f"{name}.log", command=command))
        with running(services, timeout=600):
            for turn in range(options.rounds + 1):
                for name, url in list(urls.items())[:: 1 if turn % 2 else -1]:
                    time.sleep(1.5)  # the other engine polls for a second after its last step
                    waits = asyncio.run(measure(url, examples, options.budget))
                    if turn:  # the first warms up
                        print(
                            f"{name:<20} at {len(waits.border)} borders p50 {1e3 * median(waits.border):.0f} "
                            f"ms, p99 {1e3 * quantiles(waits.border, n=100)[98]:.0f} ms; first token p50 "
                            f"{median(waits.first):.1f} s; in all {waits.wall:.1f} s",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
