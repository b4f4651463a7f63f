"""Overhead of the gateway without teacher calls, compared with vLLM's own server, and of its gate."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

from measuring.processes import ServiceError
from server.bench import gate
from server.bench.plan import Plan, synthetic
from server.bench.results import Columns, Row, Section, Spread, Table, spreads
from server.bench.servers import (
    MeasuredServer,
    Sample,
    StudentServers,
    in_turn,
    measure,
    students,
)

STREAMS = (1, 8, 32, 64)
PROMPT = 24
LENGTH = 64
BUDGET = 0.1
"""Budget at which the gate is measured too."""
ASKING = f"gateway, budget {BUDGET:g}"
# This is vLLM's own client; the console script `vllm bench serve` fails in the CPU build.
VLLM_BENCH = (
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser()\n"
    "add_cli_args(parser)\n"
    "main(parser.parse_args())"
)
REPORTED = {
    "tokens/s": "output_throughput",
    "TTFT p50 ms": "median_ttft_ms",
    "TTFT p99 ms": "p99_ttft_ms",
    "ITL p50 ms": "median_itl_ms",
    "ITL p99 ms": "p99_itl_ms",
    "failed": "failed",
}
"""Keys in the report of vLLM's client, by column."""

SPEED: Columns[Sample] = {"tokens/s": lambda sample: sample.run.tokens_per_second}
TIMES: Columns[Sample] = {
    "TTFT p50 ms": lambda sample: sample.run.first_ms,
    "ITL p50 ms": lambda sample: sample.run.gap_ms(0.5),
    "ITL p99 ms": lambda sample: sample.run.gap_ms(0.99),
    "CPU s / 1,000 tokens": lambda sample: 1000 * sample.usage.cpu_seconds / sample.run.tokens,
    "of it front end": lambda sample: 1000 * sample.usage.front_cpu_seconds / sample.run.tokens,
}


def run(plan: Plan) -> Section:
    """The gateway at budget 0 and vLLM's own server, measured by our client and by vLLM's."""
    servers = plan.once(students)
    rows = asyncio.run(_all(servers, plan))
    tables = {
        "client": Table(
            "Gateway at budget 0 compared with vLLM's own server",
            rows,
            f"Student on one core, prompts of {PROMPT} and completions of {LENGTH} tokens, streamed; "
            f"{plan.rounds} rounds, sides in alternating order. Ratios are taken round by round. "
            "*Gate / step*: CPU time of the gate's decision for as many requests, over a step at budget 0.",
        )
    }
    if not plan.quick:
        confirmed: list[Row] = []
        for name, server in _sides(servers).items():
            confirmed.append({"server": name, **vllm_bench(server, plan.pair.student, 256, plan.work)})
        about = "One run each, random prompts, 32 at once."
        tables["vllm_bench_serve"] = Table("The same by `vllm bench serve`", confirmed, about)
    return Section(tables)


def _sides(servers: StudentServers) -> dict[str, MeasuredServer]:
    return {"gateway": servers.gateway, "vLLM": servers.stock}


def _step_seconds(samples: Sequence[Sample]) -> float:
    """Median seconds of an engine's step, between two tokens of a request."""
    return median(
        sample.work.decode_seconds / (sample.work.written - sample.work.requests) for sample in samples
    )


async def _all(servers: StudentServers, plan: Plan) -> list[Row]:
    rows: list[Row] = []
    for streams in STREAMS[::2] if plan.quick else STREAMS:
        count = streams * (2 if plan.quick else 6) + (4 if plan.quick else 10)
        sides = {}
        for name, server in {**_sides(servers), ASKING: servers.gateway.with_budget(BUDGET)}.items():
            await _load(server, streams, streams, 0)  # the first steps are slow
            sides[name] = partial(_load, server, streams, count)
        samples = await in_turn(sides, plan.rounds)
        share = gate.seconds(plan.pair, streams) / _step_seconds(samples["gateway"])
        for name in sides:
            row = _row(name, streams, samples[name], samples["vLLM"])
            rows.append({**row, "gate / step": share if name == ASKING else None})
    return rows


async def _load(server: MeasuredServer, streams: int, count: int, turn: int) -> Sample:
    return await measure(server, synthetic(count, PROMPT, LENGTH, turn), streams)


def _row(name: str, streams: int, samples: Sequence[Sample], reference: Sequence[Sample]) -> Row:
    ratios: list[float] = []
    for ours, theirs in zip(samples, reference, strict=True):
        ratios.append(ours.run.tokens_per_second / theirs.run.tokens_per_second)
    return {
        "streams": streams,
        "server": name,
        **spreads(samples, SPEED),
        "of vLLM's": Spread.from_values(ratios),
        **spreads(samples, TIMES),
    }


def vllm_bench(server: MeasuredServer, tokenizer: Path, prompts: int, work: Path) -> dict[str, float]:
    """One run of vLLM's own client, 32 streams at most.

    Args:
        server: the server to measure.
        tokenizer: directory of the model's tokenizer.
        prompts: number of prompts.
        work: directory for the client's report.

    Returns:
        What the client reports, by the columns of `REPORTED`.

    Raises:
        ServiceError: the client failed; it must work unchanged.
    """
    file = work / f"{server.model}.json"
    command = [sys.executable, "-c", VLLM_BENCH, "--base-url", server.url, "--model", server.model]
    command += ["--tokenizer", str(tokenizer), "--dataset-name", "random", "--ignore-eos"]
    command += ["--input-len", str(PROMPT), "--output-len", str(LENGTH), "--max-concurrency", "32"]
    command += ["--num-prompts", str(prompts), "--num-warmups", str(min(32, prompts)), "--disable-tqdm"]
    command += ["--temperature", "0", "--save-result", "--result-dir", str(work)]
    command += ["--result-filename", file.name]
    if server.fields:
        command += ["--extra-body", json.dumps(dict(server.fields))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise ServiceError(f"vllm bench serve failed against {server.url}:\n{done.stderr[-2000:]}")
    report = json.loads(file.read_text())
    return {title: float(report[key]) for title, key in REPORTED.items()}
