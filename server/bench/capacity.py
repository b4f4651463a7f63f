"""Throughput of one student and one teacher, what it depends on, and what more load would need."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from server.bench.cost_model import Line, StepCosts, Traffic
from server.bench.cpu import PAGE
from server.bench.plan import Plan, synthetic
from server.bench.results import Columns, Row, Section, Table, spreads
from server.bench.servers import (
    MeasuredServer,
    PairServers,
    Sample,
    gateway,
    heavies,
    in_turn,
    measure,
    started,
)

STREAMS = {0.0: (1, 2, 4, 8, 16, 32, 64), 0.1: (1, 4, 16, 64)}
"""Numbers of concurrent streams, by budget."""
FIT_STREAMS = (1, 4, 16)
SPANS = (1, 4, 16)
MEMORY_STREAMS = (64, 512)
GRID_STREAMS = 8
BATCH = 16
DEMAND = 1000  # requests/s
PAUSE = 0.1
RATES = (0.05, 0.1, 0.2)
"""Teacher rates of the traffic whose demand is predicted."""

LOAD_COLUMNS: Columns[Sample] = {
    "requests/s": lambda sample: sample.run.requests_per_second,
    "tokens/s": lambda sample: sample.run.tokens_per_second,
    "p50 s": lambda sample: sample.run.latency_ms(0.5) / 1000,
    "p99 s": lambda sample: sample.run.latency_ms(0.99) / 1000,
}


@dataclass(frozen=True)
class GridPoint:
    """One load of the grid."""

    prompt: int
    completion: int
    rate: float
    span: int
    """Tokens of a teacher call."""


MIDDLE = GridPoint(prompt=64, completion=64, rate=0.1, span=1)
GRID = (
    MIDDLE,
    replace(MIDDLE, prompt=256),
    replace(MIDDLE, completion=16),
    replace(MIDDLE, completion=128),
    replace(MIDDLE, rate=0.0),
    replace(MIDDLE, rate=0.05),
    replace(MIDDLE, rate=0.3),
    replace(MIDDLE, span=4),
    replace(MIDDLE, span=16),
)


@dataclass(frozen=True)
class CapacityServers:
    """The servers that this section measures."""

    pair: PairServers
    """Teacher and gateway, with the pair's learned gate."""
    random: dict[int, MeasuredServer]
    """Gateways that ask at random places, by tokens of a call. Only their speed matters, not their text."""


def run(plan: Plan) -> Section:
    """Throughput, memory and fitted costs of one student and one teacher."""
    pair = plan.once(heavies)
    spans = SPANS[:1] if plan.quick else SPANS
    services = []
    for span in spans:
        flags = ("--gate", "random", "--ask-tokens", str(span), "--span-tokens", str(span))
        teacher = pair.teacher.child.service
        services.append(gateway(plan.heavy, teacher, plan.work, *flags, name=f"random-{span}"))
    with started([], services) as gateways:
        servers = CapacityServers(pair, dict(zip(spans, gateways, strict=True)))
        return asyncio.run(_all(servers, plan))


async def _all(servers: CapacityServers, plan: Plan) -> Section:
    saturation = await _saturation(servers.pair, plan)
    costs = await _fit(servers.pair, plan)
    grid = await _grid(servers, plan, costs)
    memory = await _memory(servers.random[SPANS[0]], plan)
    return Section(
        {
            "streams": Table(
                "Throughput against streams",
                saturation,
                f"Examples of the pair through the learned gate. {plan.rounds} rounds.",
            ),
            "grid": Table(
                "What a request's cost depends on",
                grid,
                f"Random token ids, a gate that asks at random places, {GRID_STREAMS} streams. One thing "
                "differs from the first row in each other. *Predicted*: by the fitted costs below.",
            ),
            "memory": Table("Memory of the gateway's process", memory),
            "costs": Table("Fitted costs", _cost_rows(costs), "Milliseconds of one core of this machine."),
            "demand": Table(
                f"What {DEMAND:,} requests/s need",
                _demand_rows(costs),
                f"Cores of this machine, by the model alone; batches of {BATCH}.",
            ),
        }
    )


async def _saturation(pair: PairServers, plan: Plan) -> list[Row]:
    rows: list[Row] = []
    for budget, numbers in STREAMS.items():
        for streams in numbers[2:3] if plan.quick else numbers:
            count = max(streams, 4 if budget else 32)
            load = partial(_load, pair, budget, plan, count, streams)
            samples = (await in_turn({"load": load}, plan.rounds, PAUSE))["load"]
            rows.append({"budget": budget, "streams": streams} | spreads(samples, LOAD_COLUMNS))
    return rows


async def _load(pair: PairServers, budget: float, plan: Plan, count: int, streams: int, turn: int) -> Sample:
    server = pair.gateway.with_budget(budget)
    teacher = pair.teacher if budget else None
    return await measure(server, plan.chats(count, turn), streams, teacher=teacher)


class EngineCosts(NamedTuple):
    """Times of the steps of an engine without other load."""

    step: Line
    """Seconds of a step, as a line over the batch size."""
    read: float
    """Seconds for a position that is read."""


async def _fit(pair: PairServers, plan: Plan) -> StepCosts:
    """Costs of each engine alone, from steps at several batch sizes, and from prompts that are only read."""
    rounds = 1 if plan.quick else plan.rounds
    student = await _engine_costs(pair.gateway, 64, rounds)
    teacher = await _engine_costs(pair.teacher, 8, rounds)
    front: list[float] = []
    for turn in range(rounds):
        sample = await measure(pair.gateway, synthetic(64, 16, 64, turn), 64)
        front.append(sample.usage.front_cpu_seconds / sample.run.tokens)
    return StepCosts(student.step, student.read, teacher.step, teacher.read, median(front))


async def _engine_costs(server: MeasuredServer, length: int, rounds: int) -> EngineCosts:
    """Costs of one engine, from completions of ``length`` tokens."""
    steps: list[tuple[float, float]] = []
    reads: list[float] = []
    for turn in range(rounds):
        for streams in FIT_STREAMS:
            work = (await measure(server, synthetic(streams, 16, length, turn), streams)).work
            steps.append((streams, work.decode_seconds / (work.written - work.requests)))
        sample = await measure(server, synthetic(4, 256, 1, turn), 4)
        reads.append(sample.run.seconds / sample.run.prompt_tokens)
    return EngineCosts(Line.fit(steps), median(reads))


def _cost_rows(costs: StepCosts) -> list[Row]:
    seconds = {
        "student's step, fixed": costs.student_step.fixed,
        "student's step, for each request in it": costs.student_step.each,
        "student reads a position": costs.student_read,
        "teacher's step, fixed": costs.teacher_step.fixed,
        "teacher's step, for each request in it": costs.teacher_step.each,
        "teacher reads a position": costs.teacher_read,
        "gateway's process, a token": costs.front,
    }
    return [{"what": what, "ms": 1000 * value} for what, value in seconds.items()]


async def _grid(servers: CapacityServers, plan: Plan, costs: StepCosts) -> list[Row]:
    rows: list[Row] = []
    for point in GRID[:1] if plan.quick else GRID:
        load = partial(_load_point, servers, point)
        samples = (await in_turn({"load": load}, 1 if plan.quick else plan.rounds, PAUSE))["load"]
        rows.append(_point_row(point, samples, costs))
    return rows


async def _load_point(servers: CapacityServers, point: GridPoint, turn: int) -> Sample:
    """Measure one load of the grid, with the same prompts in every round."""
    server = servers.random[point.span].with_budget(point.rate)
    requests = synthetic(GRID_STREAMS, point.prompt, point.completion)
    return await measure(server, requests, GRID_STREAMS, teacher=servers.pair.teacher)


def _point_row(point: GridPoint, samples: Sequence[Sample], costs: StepCosts) -> Row:
    tokens = calls = teacher_tokens = positions = 0
    for sample in samples:
        tokens += sample.run.tokens
        calls += sample.run.calls
        teacher_tokens += sample.run.teacher_tokens
        if sample.teacher:
            positions += sample.teacher.positions
    rate = teacher_tokens / tokens
    span = teacher_tokens / calls if calls else 1.0
    traffic = Traffic(point.prompt, point.completion, rate, span)
    predicted = costs.requests_per_second(traffic, GRID_STREAMS)
    speed = spreads(samples, LOAD_COLUMNS)
    measured = median(sample.run.requests_per_second for sample in samples)
    return {
        "prompt": point.prompt,
        "completion": point.completion,
        "rate": point.rate,
        "span": point.span,
        "realised rate": rate,
        "requests/s": speed["requests/s"],
        "tokens/s": speed["tokens/s"],
        "teacher positions/token": positions / tokens,
        "predicted requests/s": predicted,
        "predicted / measured": predicted / measured,
    }


async def _memory(server: MeasuredServer, plan: Plan) -> list[Row]:
    """Resident memory while many streams are open, in a process that has not had as many yet."""
    statm = Path(f"/proc/{server.child.process.pid}/statm")
    idle = _resident(statm)
    rows = [_memory_row(0, idle, None)]
    for streams in MEMORY_STREAMS[:1] if plan.quick else MEMORY_STREAMS:
        load = asyncio.create_task(measure(server, synthetic(streams, 64, 64), streams))
        most = 0
        while not load.done():
            most = max(most, _resident(statm))
            await asyncio.sleep(0.1)
        await load
        rows.append(_memory_row(streams, most, (most - idle) / streams))
    return rows


def _resident(statm: Path) -> int:
    """Resident memory of a process in bytes, from its `statm` file in /proc."""
    return int(statm.read_text().split()[1]) * PAGE


def _memory_row(streams: int, resident: int, stream_bytes: float | None) -> Row:
    return {
        "streams": streams,
        "resident MiB": resident / 2**20,
        "KiB above idle, per stream": None if stream_bytes is None else stream_bytes / 2**10,
    }


def _demand_rows(costs: StepCosts) -> list[Row]:
    rows: list[Row] = []
    for rate in RATES:
        for call_tokens in (1, 4):
            rows.append(_demand(costs, Traffic(64, 64, rate, call_tokens)))
    return rows


def _demand(costs: StepCosts, traffic: Traffic) -> Row:
    all_by_teacher = replace(traffic, rate=1.0, call_tokens=traffic.completion)
    return {
        "prompt": traffic.prompt,
        "completion": traffic.completion,
        "rate": traffic.rate,
        "tokens/call": traffic.call_tokens,
        "students": DEMAND * costs.student(traffic, BATCH),
        "gateway processes": DEMAND * costs.front * traffic.completion,
        "teachers": DEMAND * costs.teacher(traffic, BATCH),
        "teachers, writing alone": DEMAND * costs.teacher(all_by_teacher, BATCH),
    }
