"""Quality against speed of all ways to use a pair, vLLM's speculative decoding among them."""

from collections.abc import Sequence
from typing import NamedTuple

from server.bench.plan import Plan
from server.bench.results import Row, Section, Spread, Table, Value
from server.bench.servers import Sample
from server.bench.together import READ, STREAMS, Together, measured

PARALLEL = STREAMS[-1]


class SideTotals(NamedTuple):
    """Sums over several runs of one side."""

    tokens: int = 0
    teacher_tokens: int = 0
    steps: int = 0
    """Steps of the teacher's engine."""
    positions: int = 0
    """Positions that went through the teacher."""
    drafts: int = 0
    accepted: int = 0


def run(plan: Plan) -> Section:
    """One row for each side of `together`."""
    together = plan.once(measured)
    rows: list[Row] = []
    for side in together.samples[PARALLEL]:
        if side != READ:
            rows.append(_row(side, together, plan))
    about = (
        f"{together.rounds} rounds, other examples of the pair in each, greedy; quality over all of them, "
        f"at {PARALLEL} streams. The teacher: {plan.heavy_size}. Every side has the same two cores in all. "
        "*Cooperation*: student on one, teacher on the other. *On both cores*: the teacher has both, the "
        "student shares one. Speculative decoding has both for its one process. Forward passes and positions "
        "of the teacher for each completion token, the prompt's included."
    )
    return Section({"points": Table("Quality against speed", rows, about)})


def _row(side: str, together: Together, plan: Plan) -> Row:
    by_streams: dict[int, list[Sample]] = {}
    for streams, samples in together.samples.items():
        by_streams[streams] = samples[side]
    row: dict[str, Value] = {"side": side, "exact match": _exact_match(by_streams[PARALLEL], plan)}
    for streams, runs in by_streams.items():
        row[f"tokens/s, {streams}"] = Spread.from_values(sample.run.tokens_per_second for sample in runs)
    is_student = side.startswith(("cooperation", "student"))
    parallel = _totals(by_streams[PARALLEL], is_student)
    row["teacher rate"] = parallel.teacher_tokens / parallel.tokens
    for streams, runs in by_streams.items():
        totals = _totals(runs, is_student)
        row[f"passes/token, {streams}"] = totals.steps / totals.tokens
        if streams == PARALLEL:
            row["positions/token"] = totals.positions / totals.tokens
    row["accepted/draft"] = parallel.accepted / parallel.drafts if parallel.drafts else None
    return row


def _exact_match(samples: Sequence[Sample], plan: Plan) -> float:
    """Share of right answers, over all rounds."""
    right = 0
    total = 0
    for turn, sample in enumerate(samples):
        answers = sample.run.answers
        for answer, example in zip(answers, plan.some(len(answers), turn), strict=True):
            if example.references.accepts(answer.text):
                right += 1
        total += len(answers)
    return right / total


def _totals(samples: Sequence[Sample], is_student: bool) -> SideTotals:
    """Sums over the samples; ``is_student``: the measured server runs the student, and may have a teacher."""
    totals = SideTotals()
    for sample in samples:
        engine = sample.teacher if is_student else sample.work
        totals = SideTotals(
            totals.tokens + sample.run.tokens,
            totals.teacher_tokens + sample.run.teacher_tokens,
            totals.steps + (engine.steps if engine else 0),
            totals.positions + (engine.positions if engine else 0),
            totals.drafts + sample.work.drafts,
            totals.accepted + sample.work.accepted,
        )
    return totals
