"""One measurement for two sections: all ways to use one pair, on the same examples.

The teacher is made heavy (`heavy.py`), and every way has the same two cores in all. Student and teacher have
one core each. Or the teacher has both cores, and shares one of them with the student. Or one process has two
threads.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from measuring.processes import Service
from server.bench.plan import Plan, synthetic
from server.bench.servers import (
    BOTH,
    MeasuredServer,
    PairServers,
    Sample,
    gateway,
    heavies,
    in_turn,
    measure,
    started,
    stock,
)

BUDGETS = (0.05, 0.1, 0.2, 0.5)
DRAFTS = (2, 4, 6)
STREAMS = (1, 16)
STUDENT = "student alone"
TEACHER = "teacher alone, 1 core"
WIDE = "teacher alone, 2 cores"
APART = "cooperation"
"""Student and teacher have a core each."""
SHARING = "cooperation on both cores"
"""The teacher has both cores, and the student shares one with it."""
READ = "read"
"""The teacher only reads prompts."""
READ_PROMPT = 256

Side = Callable[[int], Awaitable[Sample]]
"""Measures one side, given the number of the round."""


@dataclass(frozen=True)
class Together:
    """Samples of all sides."""

    samples: dict[int, dict[str, list[Sample]]]
    """Samples by streams and side, in the order of rounds."""

    @property
    def rounds(self) -> int:
        """Number of times that each side was measured."""
        return len(self.samples[STREAMS[0]][STUDENT])

    @property
    def cooperative(self) -> list[str]:
        """Sides of two models with a core each, in order of their budgets."""
        return [side for side in self.samples[STREAMS[0]] if side.startswith(f"{APART}, ")]


@dataclass(frozen=True)
class SideServers:
    """The servers of all sides."""

    pair: PairServers
    alone: dict[str, MeasuredServer]
    """Servers of the sides that need only one, by side."""
    together: dict[str, PairServers]
    """Teacher and gateway of each kind of cooperation, by its name."""


def measured(plan: Plan) -> Together:
    """Measure all sides."""
    pair = plan.once(heavies)
    services: dict[str, Service] = {}
    gateways: list[Service] = []
    if not plan.quick:
        services[WIDE] = stock(plan.heavy.teacher, plan.work, "teacher-2", BOTH)
        gateways.append(gateway(plan.heavy, services[WIDE], plan.work, name="gateway-2"))
    for tokens in DRAFTS[1:2] if plan.quick else DRAFTS:
        services[f"speculative, {tokens} drafts"] = _speculative(plan, tokens)
    with started(list(services.values()), gateways) as servers:
        alone = {STUDENT: pair.gateway, TEACHER: pair.teacher}
        alone.update(zip(services, servers, strict=False))
        together = {APART: pair}
        if gateways:
            together[SHARING] = PairServers(alone[WIDE], servers[-1])
        return asyncio.run(_all(SideServers(pair, alone, together), plan))


def _speculative(plan: Plan, tokens: int) -> Service:
    """Service of speculative decoding, with draft and target in one process."""
    config = {"method": "draft_model", "model": str(plan.pair.student), "num_speculative_tokens": tokens}
    flags = ("--speculative-config", json.dumps(config))
    return stock(plan.heavy.teacher, plan.work, f"speculative-{tokens}", BOTH, *flags)


async def _all(servers: SideServers, plan: Plan) -> Together:
    samples: dict[int, dict[str, list[Sample]]] = {}
    for streams in STREAMS:
        count = (2 if plan.quick else 3) if streams == 1 else streams
        sides = _sides(servers, plan, count, streams)
        if streams == STREAMS[0]:
            for side in sides.values():
                await side(0)  # the first steps are slow
        samples[streams] = await in_turn(sides, plan.rounds)
    return Together(samples)


def _sides(servers: SideServers, plan: Plan, count: int, streams: int) -> dict[str, Side]:
    async def write(server: MeasuredServer, teacher: MeasuredServer | None, turn: int) -> Sample:
        return await measure(server, plan.chats(count, turn), streams, teacher=teacher)

    async def read(turn: int) -> Sample:
        return await measure(servers.pair.teacher, synthetic(4, READ_PROMPT, 1, turn), streams)

    sides: dict[str, Side] = {}
    for side, server in servers.alone.items():
        sides[side] = partial(write, server, None)
    sides[READ] = read
    for side, pair in servers.together.items():
        for budget in BUDGETS[1:2] if plan.quick else BUDGETS:
            asked = pair.gateway.with_budget(budget)
            sides[f"{side}, {budget:g}"] = partial(write, asked, pair.teacher)
    return sides
