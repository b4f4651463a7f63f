"""One measurement for two sections: all ways to use one pair, in turn, on the same examples.

The teacher is made heavy (`heavy.py`), and every way has both cores: student and teacher one each, or one
process with two threads.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from server.bench.plan import Plan, synthetic
from server.bench.servers import BOTH, Sample, Server, heavies, in_turn, measure, started, stock
from server.local.processes import Service

BUDGETS = (0.05, 0.1, 0.2, 0.5)
DRAFTS = (2, 4, 6)
STREAMS = (1, 16)
STUDENT, TEACHER, WIDE, READ = "student alone", "teacher alone, 1 core", "teacher alone, 2 cores", "read"
READ_PROMPT = 256

Side = Callable[[int], Awaitable[Sample]]
"""Round -> what came of it."""


@dataclass(frozen=True)
class Together:
    """Samples by streams and side, in the order of rounds."""

    samples: dict[int, dict[str, list[Sample]]]

    @property
    def rounds(self) -> int:
        return len(self.samples[STREAMS[0]][STUDENT])

    @property
    def cooperative(self) -> list[str]:
        """Sides of two models in order of their budgets."""
        return [side for side in self.samples[STREAMS[0]] if side.startswith("cooperation")]


@dataclass(frozen=True)
class Fleet:
    teacher: Server
    alone: dict[str, Server]
    """Sides of one server."""
    gateway: Server


def name(budget: float) -> str:
    return f"cooperation, {budget:g}"


def measured(plan: Plan) -> Together:
    """All sides, once."""
    drafts = DRAFTS[1:2] if plan.quick else DRAFTS
    teacher, ours = plan.once(heavies)
    stocks = {}
    if not plan.quick:
        stocks[WIDE] = stock(plan.heavy.teacher, plan.work, "teacher-2", BOTH)
    stocks |= {f"speculative, {tokens} drafts": _speculative(plan, tokens) for tokens in drafts}
    with started([*stocks.values()]) as servers:
        alone = {STUDENT: ours, TEACHER: teacher} | dict(zip(stocks, servers, strict=True))
        return asyncio.run(_all(Fleet(teacher, alone, ours), plan))


def _speculative(plan: Plan, tokens: int) -> Service:
    """Draft and target stand in one process."""
    config = {"method": "draft_model", "model": str(plan.pair.student), "num_speculative_tokens": tokens}
    flags = ("--speculative-config", json.dumps(config))
    return stock(plan.heavy.teacher, plan.work, f"speculative-{tokens}", BOTH, *flags)


async def _all(fleet: Fleet, plan: Plan) -> Together:
    samples: dict[int, dict[str, list[Sample]]] = {}
    for streams in STREAMS:
        count = (2 if plan.quick else 3) if streams == 1 else streams
        sides = _sides(fleet, plan, count, streams)
        if streams == STREAMS[0]:
            for side in sides.values():
                await side(0)  # the first steps are slow
        samples[streams] = await in_turn(sides, plan.rounds)
    return Together(samples)


def _sides(fleet: Fleet, plan: Plan, count: int, streams: int) -> dict[str, Side]:
    async def write(server: Server, teacher: Server | None, turn: int) -> Sample:
        return await measure(server, plan.chats(count, turn), streams, teacher=teacher)

    async def read(turn: int) -> Sample:
        return await measure(fleet.teacher, synthetic(4, READ_PROMPT, 1, turn), streams)

    sides: dict[str, Side] = {side: partial(write, server, None) for side, server in fleet.alone.items()}
    sides[READ] = read
    for budget in BUDGETS[1:2] if plan.quick else BUDGETS:
        sides[name(budget)] = partial(write, fleet.gateway.at(budget), fleet.teacher)
    return sides
