"""Latency that a gateway adds to a request: ours at budget 0 and LiteLLM's proxy, before the same model."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from server.bench.load import Call
from server.bench.plan import Plan
from server.bench.results import Row, Section, Spread, Table
from server.bench.servers import Sample, Server, in_turn, measure, students
from server.local.pair import HOST, START_SECONDS, free_port
from server.local.processes import Service, running

STREAMS = (1, 16)
LENGTHS = (1, 16)
DIRECT = "vLLM itself"


def run(plan: Plan) -> Section:
    direct, ours = plan.once(students)
    sides = {DIRECT: direct, "wheels, budget 0": ours}
    notes = []
    if plan.litellm is None:
        notes = ["LiteLLM: not measured, give a Python that has it by `--litellm`."]
        rows = asyncio.run(_all(sides, plan))
    else:
        proxy = _litellm(plan.litellm, direct, plan.work)
        with running([proxy], timeout=START_SECONDS) as (child,):
            url = proxy.ready_url.removesuffix("/health/liveliness")
            sides["LiteLLM proxy"] = replace(direct, url=url, child=child, engine=direct.url)
            rows = asyncio.run(_all(sides, plan))
    return Section(
        {
            "latency": Table(
                "Added latency per request",
                rows,
                "Chat completions, not streamed; added: above vLLM's in the same round. "
                f"{plan.rounds} rounds. The proxy runs on whatever core is free.",
            )
        },
        notes,
    )


def _litellm(python: Path, behind: Server, work: Path) -> Service:
    """LiteLLM's proxy before a vLLM server, one worker, as its documentation sets it up."""
    parameters = {"model": f"hosted_vllm/{behind.model}", "api_base": f"{behind.url}/v1", "api_key": "none"}
    config = {"model_list": [{"model_name": behind.model, "litellm_params": parameters}]}
    (work / "litellm.yaml").write_text(json.dumps(config))  # JSON is YAML
    port = free_port()
    command = (str(python.parent / "litellm"), "--config", str(work / "litellm.yaml"))
    return Service(
        name="litellm",
        command=(*command, "--host", HOST, "--port", str(port), "--num_workers", "1"),
        ready_url=f"http://{HOST}:{port}/health/liveliness",
        log=work / "litellm.log",
        environment={
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # ours asks for no key either
            "LITELLM_LOG": "ERROR",
            "LITELLM_MODE": "PRODUCTION",
        },
    )


async def _all(sides: dict[str, Server], plan: Plan) -> list[Row]:
    rows: list[Row] = []
    for streams in STREAMS[:1] if plan.quick else STREAMS:
        for length in LENGTHS:
            count = max(10, streams) if plan.quick else max(60, 4 * streams)

            async def load(
                server: Server, turn: int, streams: int = streams, length: int = length, count: int = count
            ) -> Sample:
                calls = [Call.chat(example.source, max_tokens=length) for example in plan.some(count, turn)]
                return await measure(server, calls, streams, stream=False)

            for server in sides.values():
                await load(server, 0, count=8)  # connections, first steps
            samples = await in_turn({name: partial(load, side) for name, side in sides.items()}, plan.rounds)
            rows += [_row(name, streams, length, samples[name], samples[DIRECT]) for name in sides]
    return rows


def _row(name: str, streams: int, length: int, samples: Sequence[Sample], direct: Sequence[Sample]) -> Row:
    def added(share: float) -> Spread:
        pairs = zip(samples, direct, strict=True)
        return Spread.of(a.run.latency_ms(share) - b.run.latency_ms(share) for a, b in pairs)

    return {
        "streams": streams,
        "tokens": length,
        "server": name,
        "p50 ms": Spread.of(s.run.latency_ms(0.5) for s in samples),
        "p99 ms": Spread.of(s.run.latency_ms(0.99) for s in samples),
        "added p50 ms": None if name == DIRECT else added(0.5),
        "added p99 ms": None if name == DIRECT else added(0.99),
        "requests/s": Spread.of(len(s.run.answers) / s.run.seconds for s in samples),
    }
