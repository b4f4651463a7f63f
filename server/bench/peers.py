"""Latency that a gateway adds: ours at budget 0 and LiteLLM's proxy, in front of the same model."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from measuring.pair import HOST, START_SECONDS, free_port
from measuring.processes import Service, running
from server.bench.plan import Plan
from server.bench.results import Columns, Row, Section, Spread, Table, spreads
from server.bench.servers import MeasuredServer, Sample, in_turn, measure, students

STREAMS = (1, 16)
LENGTHS = (1, 16)
DIRECT = "vLLM itself"
LIVENESS = "/health/liveliness"
"""Path of LiteLLM's liveness check, in LiteLLM's own spelling."""

LATENCIES: Columns[Sample] = {
    "p50 ms": lambda sample: sample.run.latency_ms(0.5),
    "p99 ms": lambda sample: sample.run.latency_ms(0.99),
}
SPEED: Columns[Sample] = {"requests/s": lambda sample: sample.run.requests_per_second}


def run(plan: Plan) -> Section:
    """Latencies of vLLM's own server, of the gateway and, if there is one, of LiteLLM's proxy."""
    servers = plan.once(students)
    sides = {DIRECT: servers.stock, "wheels, budget 0": servers.gateway}
    notes: list[str] = []
    if plan.litellm is None:
        notes.append("LiteLLM: not measured, give a Python that has it by `--litellm`.")
        rows = asyncio.run(_all(sides, plan))
    else:
        proxy = _litellm(plan.litellm, servers.stock, plan.work)
        with running([proxy], timeout=START_SECONDS) as (child,):
            url = proxy.ready_url.removesuffix(LIVENESS)
            sides["LiteLLM proxy"] = replace(servers.stock, url=url, child=child, engine=servers.stock.url)
            rows = asyncio.run(_all(sides, plan))
    table = Table(
        "Added latency per request",
        rows,
        "Chat completions, not streamed; added: above vLLM's in the same round. "
        f"{plan.rounds} rounds. The proxy runs on whatever core is free.",
    )
    return Section({"latency": table}, notes)


def _litellm(python: Path, server: MeasuredServer, work: Path) -> Service:
    """LiteLLM's proxy before a vLLM server, one worker, as its documentation sets it up."""
    parameters = {"model": f"hosted_vllm/{server.model}", "api_base": f"{server.url}/v1", "api_key": "none"}
    config = {"model_list": [{"model_name": server.model, "litellm_params": parameters}]}
    (work / "litellm.yaml").write_text(json.dumps(config))  # JSON is YAML
    port = free_port()
    command = (str(python.parent / "litellm"), "--config", str(work / "litellm.yaml"))
    return Service(
        name="litellm",
        command=(*command, "--host", HOST, "--port", str(port), "--num_workers", "1"),
        ready_url=f"http://{HOST}:{port}{LIVENESS}",
        log=work / "litellm.log",
        environment={
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # ours asks for no key either
            "LITELLM_LOG": "ERROR",
            "LITELLM_MODE": "PRODUCTION",
        },
    )


async def _all(sides: dict[str, MeasuredServer], plan: Plan) -> list[Row]:
    rows: list[Row] = []
    for streams in STREAMS[:1] if plan.quick else STREAMS:
        count = max(10, streams) if plan.quick else max(60, 4 * streams)
        for length in LENGTHS:
            loads = {}
            for name, server in sides.items():
                await _load(server, plan, streams, length, 8, 0)  # connections, first steps
                loads[name] = partial(_load, server, plan, streams, length, count)
            samples = await in_turn(loads, plan.rounds)
            for name in sides:
                rows.append(_row(name, streams, length, samples))
    return rows


async def _load(
    server: MeasuredServer, plan: Plan, streams: int, length: int, count: int, turn: int
) -> Sample:
    return await measure(server, plan.chats(count, turn, max_tokens=length), streams, stream=False)


def _row(name: str, streams: int, length: int, samples: dict[str, list[Sample]]) -> Row:
    return {
        "streams": streams,
        "tokens": length,
        "server": name,
        **spreads(samples[name], LATENCIES),
        "added p50 ms": None if name == DIRECT else _added(samples[name], samples[DIRECT], 0.5),
        "added p99 ms": None if name == DIRECT else _added(samples[name], samples[DIRECT], 0.99),
        **spreads(samples[name], SPEED),
    }


def _added(samples: Sequence[Sample], direct: Sequence[Sample], share: float) -> Spread:
    """Spread of the difference in a quantile of latencies to the direct server, round by round."""
    added: list[float] = []
    for sample, reference in zip(samples, direct, strict=True):
        added.append(sample.run.latency_ms(share) - reference.run.latency_ms(share))
    return Spread.from_values(added)
