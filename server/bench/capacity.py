"""How much one student and one teacher carry, what that depends on, and what more would need."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from server.bench.cpu import PAGE
from server.bench.load import Call
from server.bench.model import Costs, Line, Traffic
from server.bench.plan import Plan, synthetic
from server.bench.results import Row, Section, Spread, Table
from server.bench.servers import Sample, Server, gateway, heavies, in_turn, measure, started

STREAMS = {0.0: (1, 2, 4, 8, 16, 32, 64), 0.1: (1, 4, 16, 64)}
"""By budget."""
FIT_STREAMS = (1, 4, 16)
SPANS = (1, 4, 16)
MIDDLE = {"prompt": 64, "completion": 64, "rate": 0.1, "span": 1}
GRID = {"prompt": (256,), "completion": (16, 128), "rate": (0.0, 0.05, 0.3), "span": (4, 16)}
GRID_STREAMS = 8
BATCH = 16
DEMAND = 1000  # requests/s


@dataclass(frozen=True)
class Fleet:
    teacher: Server
    gateway: Server
    """With the pair's learned gate."""
    random: dict[int, Server]
    """Gateways that ask at random places, by tokens of a call: only speed counts."""


def run(plan: Plan) -> Section:
    teacher, learned = plan.once(heavies)
    spans = SPANS[:1] if plan.quick else SPANS
    gateways = []
    for span in spans:
        flags = ("--gate", "random", "--ask-tokens", str(span), "--span-tokens", str(span))
        gateways.append(gateway(plan.heavy, teacher.child.service, plan.work, *flags, name=f"random-{span}"))
    with started([], gateways) as random:
        fleet = Fleet(teacher, learned, dict(zip(spans, random, strict=True)))
        return asyncio.run(_all(fleet, plan))


async def _all(fleet: Fleet, plan: Plan) -> Section:
    saturation = await _saturation(fleet, plan)
    costs, fitted = await _fit(fleet, plan)
    grid = await _grid(fleet, plan, costs)
    memory = await _memory(next(iter(fleet.random.values())), plan)
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
            "costs": Table("Fitted costs", fitted, "Milliseconds of one core of this machine."),
            "demand": Table(
                f"What {DEMAND:,} requests/s need",
                [_demand(costs, traffic) for traffic in _traffics()],
                f"Cores of this machine, by the model alone; batches of {BATCH}.",
            ),
        }
    )


async def _saturation(fleet: Fleet, plan: Plan) -> list[Row]:
    rows: list[Row] = []
    for budget, numbers in STREAMS.items():
        for streams in numbers[2:3] if plan.quick else numbers:
            count = max(streams, 4 if budget else 32)
            server = fleet.gateway.at(budget)
            load = partial(_load, server, fleet.teacher if budget else None, plan, count, streams)
            samples = (await in_turn({"": load}, plan.rounds, pause=0.1))[""]
            rows.append(
                {
                    "budget": budget,
                    "streams": streams,
                    "requests/s": Spread.of(len(s.run.answers) / s.run.seconds for s in samples),
                    "tokens/s": Spread.of(s.run.tokens_per_second for s in samples),
                    "p50 s": Spread.of(s.run.latency_ms(0.5) / 1000 for s in samples),
                    "p99 s": Spread.of(s.run.latency_ms(0.99) / 1000 for s in samples),
                }
            )
    return rows


async def _load(
    server: Server, teacher: Server | None, plan: Plan, count: int, streams: int, turn: int
) -> Sample:
    return await measure(server, plan.chats(count, turn), streams, teacher=teacher)


async def _fit(fleet: Fleet, plan: Plan) -> tuple[Costs, list[Row]]:
    """Each engine alone: steps at several batches, and prompts that are only read."""
    student = fleet.gateway.at(0)
    rounds = range(1 if plan.quick else plan.rounds)
    steps: dict[str, list[tuple[float, float]]] = {"student": [], "teacher": []}
    reads: dict[str, list[float]] = {"student": [], "teacher": []}
    front: list[float] = []
    for name, server, length in (("student", student, 64), ("teacher", fleet.teacher, 8)):
        for turn in rounds:
            for streams in FIT_STREAMS:
                work = (await measure(server, synthetic(streams, 16, length, turn), streams)).work
                steps[name].append((streams, work.decode_seconds / (work.written - work.requests)))
            sample = await measure(server, synthetic(4, 256, 1, turn), 4)
            reads[name].append(sample.run.seconds / sum(a.prompt_tokens for a in sample.run.answers))
    for turn in rounds:
        sample = await measure(student, synthetic(64, 16, 64, turn), 64)
        front.append(sample.usage.front_cpu_seconds / sample.run.tokens)
    costs = Costs(
        student_step=Line.fit(steps["student"]),
        student_read=median(reads["student"]),
        teacher_step=Line.fit(steps["teacher"]),
        teacher_read=median(reads["teacher"]),
        front=median(front),
    )
    rows: list[Row] = []
    for name, line in (("student", costs.student_step), ("teacher", costs.teacher_step)):
        rows.append({"what": f"{name}'s step, fixed", "ms": 1000 * line.fixed})
        rows.append({"what": f"{name}'s step, for each request in it", "ms": 1000 * line.each})
        rows.append({"what": f"{name} reads a position", "ms": 1000 * median(reads[name])})
    rows.append({"what": "gateway's process, a token", "ms": 1000 * costs.front})
    return costs, rows


async def _grid(fleet: Fleet, plan: Plan, costs: Costs) -> list[Row]:
    points = [MIDDLE]
    for name, values in GRID.items():
        points += [MIDDLE | {name: value} for value in values]
    if plan.quick:
        points = points[:1]
    rows: list[Row] = []
    for point in points:
        server = fleet.random[int(point["span"])].at(point["rate"])
        calls = synthetic(GRID_STREAMS, int(point["prompt"]), int(point["completion"]))

        async def load(turn: int, server: Server = server, calls: Sequence[Call] = calls) -> Sample:
            return await measure(server, calls, GRID_STREAMS, teacher=fleet.teacher)

        samples = (await in_turn({"": load}, 1 if plan.quick else plan.rounds, pause=0.1))[""]
        rows.append(_point(point, samples, costs))
    return rows


def _point(point: dict[str, float], samples: Sequence[Sample], costs: Costs) -> Row:
    tokens = sum(s.run.tokens for s in samples)
    calls = sum(s.run.calls for s in samples)
    rate = sum(s.run.teacher_tokens for s in samples) / tokens
    span = rate * tokens / calls if calls else 1.0
    predicted = costs.requests_per_second(
        Traffic(point["prompt"], point["completion"], rate, span), GRID_STREAMS
    )
    measured = Spread.of(len(s.run.answers) / s.run.seconds for s in samples)
    return dict(point) | {
        "realised rate": rate,
        "requests/s": measured,
        "tokens/s": Spread.of(s.run.tokens_per_second for s in samples),
        "teacher positions/token": sum(s.teacher.positions for s in samples if s.teacher) / tokens,
        "predicted requests/s": predicted,
        "predicted / measured": predicted / measured.median,
    }


async def _memory(server: Server, plan: Plan) -> list[Row]:
    """Resident memory while many streams are open, in a process that has not had so many yet."""
    statm = Path(f"/proc/{server.child.process.pid}/statm")

    def resident() -> int:
        return int(statm.read_text().split()[1]) * PAGE

    async def highest(until: asyncio.Task[Sample]) -> int:
        most = 0
        while not until.done():
            most = max(most, resident())
            await asyncio.sleep(0.1)
        return most

    rows: list[Row] = []
    idle = resident()
    for streams in (64,) if plan.quick else (64, 512):
        load = asyncio.create_task(measure(server.at(0), synthetic(streams, 64, 64), streams))
        most = await highest(load)
        await load
        rows.append(
            {
                "streams": streams,
                "resident MiB": most / 2**20,
                "KiB above idle, per stream": (most - idle) / streams / 2**10,
            }
        )
    return [{"streams": 0, "resident MiB": idle / 2**20, "KiB above idle, per stream": None}, *rows]


def _traffics() -> list[Traffic]:
    return [Traffic(64, 64, rate, span) for rate in (0.05, 0.1, 0.2) for span in (1, 4)]


def _demand(costs: Costs, traffic: Traffic) -> Row:
    alone = DEMAND * costs.teacher(
        Traffic(traffic.prompt, traffic.completion, 1.0, traffic.completion), BATCH
    )
    return {
        "prompt": traffic.prompt,
        "completion": traffic.completion,
        "rate": traffic.rate,
        "tokens/call": traffic.call_tokens,
        "students": DEMAND * costs.student(traffic, BATCH),
        "gateway processes": DEMAND * costs.front * traffic.completion,
        "teachers": DEMAND * costs.teacher(traffic, BATCH),
        "teachers, writing alone": alone,
    }
