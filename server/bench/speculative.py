"""Quality against speed beside vLLM's speculative decoding, the teacher alone and the student alone."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from functools import partial

from server.bench.plan import Plan
from server.bench.results import Row, Section, Spread, Table
from server.bench.servers import (
    BOTH,
    LAST,
    Sample,
    Server,
    gateway,
    in_turn,
    measure,
    started,
    stock,
)
from server.measure import Example
from server.processes import Service

BUDGETS = (0.05, 0.1, 0.2, 0.5)
DRAFTS = (2, 4, 6)
STREAMS = (1, 16)
PARALLEL = 16

Side = Callable[[int, int], Awaitable[Sample]]
"""(examples, round) -> what came of them."""


def run(plan: Plan) -> Section:
    teacher = stock(plan.heavy.teacher, plan.work, "teacher", LAST)
    wide = stock(plan.heavy.teacher, plan.work, "teacher-2", BOTH)
    drafting = {
        f"speculative, {tokens} drafts": _speculative(plan, tokens)
        for tokens in (DRAFTS[1:2] if plan.quick else DRAFTS)
    }
    services = [teacher, wide, *drafting.values()]
    with started(services, [gateway(plan.heavy, teacher, plan.work)]) as (behind, both, *others, ours):
        alone = dict(zip(drafting, others, strict=True)) | {
            "student alone": ours.at(0),
            "teacher alone, 1 core": behind,
            "teacher alone, 2 cores": both,
        }
        rows = asyncio.run(_all(alone, ours, behind, plan))
    return Section(
        {
            "points": Table(
                "Quality against speed",
                rows,
                f"{plan.rounds} rounds, other examples of the pair in each, greedy; quality over all of "
                f"them, at {PARALLEL} streams. The teacher: 103 M parameters. Cooperation: student on one "
                "core, teacher on the other. Forward passes and positions of the teacher for each completion "
                "token, the prompt's included.",
            )
        }
    )


def _speculative(plan: Plan, tokens: int) -> Service:
    """Draft and target stand in one process: it has both cores, as cooperation has."""
    config = {"method": "draft_model", "model": str(plan.pair.student), "num_speculative_tokens": tokens}
    name = f"speculative-{tokens}"
    return stock(plan.heavy.teacher, plan.work, name, BOTH, "--speculative-config", json.dumps(config))


async def _all(alone: dict[str, Server], ours: Server, behind: Server, plan: Plan) -> list[Row]:
    samples: dict[str, dict[int, list[Sample]]] = {}
    for streams in STREAMS:
        count = (2 if plan.quick else 3) if streams == 1 else 16
        sides: dict[str, Callable[[int], Awaitable[Sample]]] = {}
        for name, server in alone.items():
            sides[name] = partial(_measure, server, plan, count, streams, None)
        for budget in BUDGETS[1:2] if plan.quick else BUDGETS:
            sides[f"cooperation, {budget:g}"] = partial(
                _measure, ours.at(budget), plan, count, streams, behind
            )
        for side in sides.values():
            await side(0) if streams == 1 else None  # the first steps are slow
        for name, found in (await in_turn(sides, plan.rounds)).items():
            samples.setdefault(name, {})[streams] = found
    return [
        _row(name, found, plan, own_work=not name.startswith(("coop", "student")))
        for name, found in samples.items()
    ]


async def _measure(
    server: Server, plan: Plan, count: int, streams: int, teacher: Server | None, turn: int
) -> Sample:
    return await measure(server, plan.chats(count, turn), streams, teacher=teacher)


def _row(name: str, found: dict[int, list[Sample]], plan: Plan, *, own_work: bool) -> Row:
    crowd = found[PARALLEL]
    verdicts = [
        answer.text in example.answers
        for turn, sample in enumerate(crowd)
        for answer, example in zip(sample.run.answers, _examples(plan, sample, turn), strict=True)
    ]
    row: dict[str, object] = {"side": name, "exact match": sum(verdicts) / len(verdicts)}
    for streams, samples in found.items():
        row[f"tokens/s, {streams}"] = Spread.of(s.run.tokens_per_second for s in samples)
    row["teacher rate"] = sum(s.run.teacher_tokens for s in crowd) / sum(s.run.tokens for s in crowd)
    works = {
        streams: [s.work if own_work else s.teacher for s in samples] for streams, samples in found.items()
    }
    for streams, engines in works.items():
        tokens = sum(s.run.tokens for s in found[streams])
        steps = sum(engine.steps for engine in engines if engine)
        row[f"passes/token, {streams}"] = steps / tokens
        if streams == PARALLEL:
            row["positions/token"] = sum(engine.positions for engine in engines if engine) / tokens
    drafts = sum(s.work.drafts for s in crowd)
    row["accepted/draft"] = sum(s.work.accepted for s in crowd) / drafts if drafts else None
    return row


def _examples(plan: Plan, sample: Sample, turn: int) -> list[Example]:
    return plan.some(len(sample.run.answers), turn)
