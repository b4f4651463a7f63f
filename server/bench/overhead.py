"""What the gateway costs where no teacher is asked: beside vLLM's own server, same student, same core."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from server.bench.plan import Plan, synthetic
from server.bench.results import Section, Spread, Table
from server.bench.servers import Sample, Server, in_turn, measure, students
from server.local.processes import ServiceError

STREAMS = (1, 8, 32, 64)
PROMPT, LENGTH = 24, 64
# vLLM's own client; the console script `vllm bench serve` fails in the CPU build.
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
}


def run(plan: Plan) -> Section:
    theirs, ours = plan.once(students)
    rows = asyncio.run(_ours(ours, theirs, plan))
    confirmed = [
        {"server": name} | vllm_bench(server, plan.pair.student, 256, plan.work)
        for name, server in (() if plan.quick else _sides(ours, theirs))
    ]
    tables = {
        "client": Table(
            "Gateway at budget 0 beside vLLM's own server",
            rows,
            f"Student on one core, prompts of {PROMPT} and completions of {LENGTH} tokens, streamed; "
            f"{plan.rounds} rounds, sides in alternating order. Ratios are taken round by round.",
        )
    }
    if confirmed:
        about = "One run each, random prompts, 32 at once."
        tables["vllm_bench_serve"] = Table("The same by `vllm bench serve`", confirmed, about)
    return Section(tables)


def _sides(ours: Server, theirs: Server) -> list[tuple[str, Server]]:
    return [("gateway", ours), ("vLLM", theirs)]


async def _ours(ours: Server, theirs: Server, plan: Plan) -> list[dict[str, object]]:
    rows = []
    for streams in STREAMS[::2] if plan.quick else STREAMS:
        count = streams * (2 if plan.quick else 6) + (4 if plan.quick else 10)

        async def load(server: Server, turn: int, streams: int = streams, count: int = count) -> Sample:
            return await measure(server, synthetic(count, PROMPT, LENGTH, turn), streams)

        sides = {name: partial(load, server) for name, server in _sides(ours, theirs)}
        for _, server in _sides(ours, theirs):
            await measure(server, synthetic(streams, PROMPT, LENGTH), streams)  # the first steps are slow
        samples = await in_turn(sides, plan.rounds)
        rows += [_row(name, streams, samples[name], samples["vLLM"]) for name in sides]
    return rows


def _row(
    name: str, streams: int, samples: Sequence[Sample], reference: Sequence[Sample]
) -> dict[str, object]:
    ratios = [
        a.run.tokens_per_second / b.run.tokens_per_second for a, b in zip(samples, reference, strict=True)
    ]
    return {
        "streams": streams,
        "server": name,
        "tokens/s": Spread.of(s.run.tokens_per_second for s in samples),
        "of vLLM's": Spread.of(ratios),
        "TTFT p50 ms": Spread.of(s.run.first_ms for s in samples),
        "ITL p50 ms": Spread.of(s.run.gap_ms(0.5) for s in samples),
        "ITL p99 ms": Spread.of(s.run.gap_ms(0.99) for s in samples),
        "CPU s / 1,000 tokens": Spread.of(1000 * s.usage.cpu_seconds / s.run.tokens for s in samples),
        "of it front end": Spread.of(1000 * s.usage.front_cpu_seconds / s.run.tokens for s in samples),
    }


def vllm_bench(server: Server, tokenizer: Path, prompts: int, work: Path) -> dict[str, float]:
    """One run of vLLM's own client, 32 streams at most: what it reports, by `REPORTED`, and `failed`.

    Raises:
        ServiceError: it failed; it must work unchanged.
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
    return {title: float(report[key]) for title, key in (REPORTED | {"failed": "failed"}).items()}
