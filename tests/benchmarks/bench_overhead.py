"""What the gateway costs at budget 0: python -m tests.benchmarks.bench_overhead

The gateway and vLLM's own server with the same student, on the same core, in turn: streamed completions
of 64 tokens. Prints the ratio of tokens/s, pair by pair; above 1 the gateway is faster. Other work on the
core scatters the pairs: read the median, and the ratio of the fastest rounds beside it.
"""

import argparse
import asyncio
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import aiohttp

from server.pair import HOST, Pair, free_port, gateway_service, is_cpu_build, teacher_service
from server.processes import running

DEMO = Path(__file__).parents[2] / "deploy" / "demo"
TOKENS = 64
STREAMS = (1, 8, 32)
QUIET_SECONDS = 1.5  # a worker of vLLM polls for a second after its last step, on the core of both servers


@dataclass
class Side:
    """A server, and its tokens/s by round."""

    url: str
    extra: dict[str, object]
    rates: list[float] = field(default_factory=list)


async def complete(session: aiohttp.ClientSession, url: str, body: dict[str, object]) -> None:
    async with session.post(f"{url}/v1/completions", json=body) as reply:
        reply.raise_for_status()
        async for _ in reply.content:
            pass


async def rate(url: str, extra: dict[str, object], streams: int, requests: int) -> float:
    """Tokens/s of `requests` completions, `streams` at a time."""
    slots = asyncio.Semaphore(streams)
    fixed = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0, "stream": True} | extra
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # no race with a server that closes idle ones
    async with aiohttp.ClientSession(connector=connector) as session:

        async def one(number: int) -> None:
            async with slots:
                prompt = [5 + (number * 7 + i) % 400 for i in range(24)]
                await complete(session, url, fixed | {"prompt": prompt})

        start = time.perf_counter()
        await asyncio.gather(*map(one, range(requests)))
        return requests * TOKENS / (time.perf_counter() - start)


async def compare(gateway: Side, stock: Side, all_streams: list[int], rounds: int) -> None:
    sides = [gateway, stock]
    for streams in all_streams:
        for side in sides:
            await rate(side.url, side.extra, streams, streams)  # warm-up
            side.rates.clear()
        for turn in range(rounds):
            for side in sides if turn % 2 else sides[::-1]:
                requests = max(12, 6 * streams)
                await asyncio.sleep(QUIET_SECONDS)
                side.rates.append(await rate(side.url, side.extra, streams, requests))
        ratios = [ours / theirs for ours, theirs in zip(gateway.rates, stock.rates, strict=True)]
        print(
            f"{streams:>3} streams: {median(ratios):.3f} of vLLM's tokens/s (pairs from {min(ratios):.2f} to "
            f"{max(ratios):.2f}), fastest rounds {max(gateway.rates) / max(stock.rates):.3f} "
            f"({max(gateway.rates):,.0f} and {max(stock.rates):,.0f} tokens/s)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", type=Path, default=DEMO)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--streams", type=int, nargs="*", default=STREAMS)
    options = parser.parse_args()
    pair = Pair.in_directory(options.pair)
    teacher, gateway, stock = (f"http://{HOST}:{free_port()}" for _ in range(3))
    with tempfile.TemporaryDirectory() as directory:
        logs = Path(directory)
        first = gateway_service(pair, teacher, gateway, logs)
        second = teacher_service(pair.student, stock, logs, name="stock")
        if is_cpu_build():  # on the gateway's core, not beside it
            core = {"VLLM_CPU_OMP_THREADS_BIND": first.environment["VLLM_CPU_OMP_THREADS_BIND"]}
            second = type(second)(**vars(second) | {"environment": {**second.environment, **core}})
        services = [teacher_service(pair.teacher, teacher, logs), first, second]
        ours = Side(gateway, {"model": "wheels", "teacher_budget": 0})
        theirs = Side(stock, {"model": "stock"})
        with running(services, timeout=300):
            asyncio.run(compare(ours, theirs, options.streams, options.rounds))


if __name__ == "__main__":
    main()
