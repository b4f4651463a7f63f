"""Measures how long a reservation takes.

Every reservation is made in two scopes, a tenant's tokens and a fraction of all traffic, and is settled.
Memory: one after the other in one process. Redis: a server of its own on the loopback; first --clients
processes, each with one operation under way at a time; then one process with many streams.

    python -m tests.benchmarks.bench_ledger
"""

import argparse
import asyncio
import math
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import uvloop

from router.ledger import FractionOfTraffic, Lease, Ledger, MemoryLedger, Scope, TokensPerWindow
from router.ledger.redis import RedisLedger
from tests.helpers.redis_server import RedisServer

Times = dict[str, list[float]]
"""Seconds by operation."""
SCOPES = (
    Scope("tenant", "acme", TokensPerWindow(tokens=10**9, window_seconds=3600)),
    Scope("global", "", FractionOfTraffic(fraction=0.5, window_seconds=3600, slack_tokens=10**6)),
)


async def measure(ledger: Ledger, reservations: int, rate: float, times: Times) -> None:
    """Reserve and settle; ``rate`` a second on average at random moments, 0 = without a pause."""
    for index in range(reservations):
        if rate:
            await asyncio.sleep(random.expovariate(rate))
        started = time.perf_counter()
        lease = await ledger.reserve(SCOPES, 8, at_least=1, student_tokens=40)
        reserved = time.perf_counter()
        if not isinstance(lease, Lease):
            raise SystemExit(f"refused: {lease}")
        await ledger.settle(lease, index % 9)
        times["reserve"].append(reserved - started)
        times["settle"].append(time.perf_counter() - reserved)


def line(name: str, times: list[float]) -> str:
    """Quantiles of the nearest rank, as one row of the table."""
    ordered = sorted(times)
    row = f"{name:<42}{len(ordered):>8}"
    for share in (0.5, 0.99, 0.999):
        microseconds = ordered[math.ceil(share * len(ordered)) - 1] * 1e6
        row += f"{microseconds:>10.0f}"
    return row


def no_times() -> Times:
    """Empty lists for the next measurement."""
    return {"reserve": [], "settle": []}


async def client(build: Callable[[], Ledger], streams: int, reservations: int, rate: float) -> Times:
    """Measure one ledger in this process that several streams use at once."""
    ledger = build()
    await measure(ledger, 20, 0, no_times())  # connections, scripts
    times = no_times()
    await asyncio.gather(*(measure(ledger, reservations, rate, times) for _ in range(streams)))
    await ledger.aclose()
    return times


def redis_client(url: str, streams: int, reservations: int, rate: float) -> Times:
    """`client` of a ledger in Redis, in a process of its own."""
    return uvloop.run(client(lambda: RedisLedger.connect(url, timeout=5.0), streams, reservations, rate))


def measure_clients(url: str, options: argparse.Namespace) -> None:
    """Measure several processes, each with one operation under way at a time."""
    for rate, name in ((options.rate, f"{options.rate:g}/s each"), (0.0, "without a pause")):
        job = (url, 1, options.reservations, rate)
        with multiprocessing.get_context("spawn").Pool(options.clients) as pool:
            results = pool.starmap(redis_client, [job] * options.clients, chunksize=1)
        for operation in ("reserve", "settle"):
            times: list[float] = []
            for result in results:
                times += result[operation]
            print(line(f"redis, {options.clients} clients, {name}, {operation}", times))


def measure_streams(url: str, reservations: int) -> None:
    """Measure one process in which many streams use the ledger at once."""
    started = time.perf_counter()
    times = redis_client(url, 64, reservations // 16, 0)
    seconds = time.perf_counter() - started
    for operation, values in times.items():
        print(line(f"redis, 1 client, 64 streams, {operation}", values))
    print(f"redis, 1 client, 64 streams: {2 * len(times['reserve']) / seconds:.0f} operations/s")


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reservations", type=int, default=2000, help="by every client")
    parser.add_argument("--clients", type=int, default=4, help="processes")
    parser.add_argument("--rate", type=float, default=100, help="reservations a second by every client")
    options = parser.parse_args()
    print(f"{'microseconds':<42}{'calls':>8}{'p50':>10}{'p99':>10}{'p99.9':>10}")
    times = uvloop.run(client(MemoryLedger, 1, 20 * options.reservations, 0))
    for operation, values in times.items():
        print(line(f"memory, {operation}", values))
    with tempfile.TemporaryDirectory() as directory:
        server = RedisServer(Path(directory))
        try:
            measure_clients(server.url, options)
            measure_streams(server.url, options.reservations)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
