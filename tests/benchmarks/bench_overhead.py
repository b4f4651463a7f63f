"""What the gateway costs at budget 0: python -m tests.benchmarks.bench_overhead

The gateway and vLLM's own server with the same student, on the same core, in turn: streamed completions
of 64 tokens. Prints the ratio of tokens/s, pair by pair; above 1 the gateway is faster.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import aiohttp

from server.pair import HOST, Pair, free_port, gateway_service, is_cpu_build, teacher_service
from server.processes import running

DEMO = Path(__file__).parents[2] / "deploy" / "demo"
TOKENS = 64
STREAMS = (1, 8, 32)


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


async def compare(gateway: str, stock: str, rounds: int) -> None:
    sides = {
        "gateway": (gateway, {"model": "wheels", "teacher_budget": 0}),
        "vllm": (stock, {"model": "stock"}),
    }
    for streams in STREAMS:
        requests = max(12, 6 * streams)
        for url, extra in sides.values():
            await rate(url, extra, streams, streams)  # warm-up
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(rounds):
            for name in sorted(sides, reverse=bool(turn % 2)):
                rates[name].append(await rate(*sides[name], streams, requests))
        ratios = [ours / theirs for ours, theirs in zip(rates["gateway"], rates["vllm"], strict=True)]
        print(
            f"{streams:>3} streams: {statistics.median(ratios):.3f} of vLLM's tokens/s "
            f"(pairs from {min(ratios):.2f} to {max(ratios):.2f}; medians "
            f"{statistics.median(rates['gateway']):,.0f} and {statistics.median(rates['vllm']):,.0f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", type=Path, default=DEMO)
    parser.add_argument("--rounds", type=int, default=9)
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
        with running(services, timeout=300):
            asyncio.run(compare(gateway, stock, options.rounds))


if __name__ == "__main__":
    main()
