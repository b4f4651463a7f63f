"""Quality against speed beside vLLM's speculative decoding, the teacher alone and the student alone."""

from server.bench.plan import Plan
from server.bench.results import Row, Section, Spread, Table
from server.bench.servers import Sample
from server.bench.together import READ, STREAMS, measured

PARALLEL = STREAMS[-1]


def run(plan: Plan) -> Section:
    together = plan.once(measured)
    sides = [side for side in together.samples[PARALLEL] if side != READ]
    rows = [_row(side, {streams: s[side] for streams, s in together.samples.items()}, plan) for side in sides]
    about = (
        f"{together.rounds} rounds, other examples of the pair in each, greedy; quality over all of them, "
        f"at {PARALLEL} streams. The teacher: {plan.heavy_size}. Cooperation: student on one core, teacher "
        "on the other; speculative decoding has both for its one process. Forward passes and positions of "
        "the teacher for each completion token, the prompt's included."
    )
    return Section({"points": Table("Quality against speed", rows, about)})


def _row(side: str, found: dict[int, list[Sample]], plan: Plan) -> Row:
    crowd = found[PARALLEL]
    verdicts = [
        answer.text in example.answers
        for turn, sample in enumerate(crowd)
        for answer, example in zip(sample.run.answers, plan.some(len(sample.run.answers), turn), strict=True)
    ]
    row: dict[str, object] = {"side": side, "exact match": sum(verdicts) / len(verdicts)}
    for streams, samples in found.items():
        row[f"tokens/s, {streams}"] = Spread.of(s.run.tokens_per_second for s in samples)
    row["teacher rate"] = sum(s.run.teacher_tokens for s in crowd) / sum(s.run.tokens for s in crowd)
    behind = side.startswith(("cooperation", "student"))  # where the measured server is no teacher
    works = {
        streams: [s.teacher if behind else s.work for s in samples] for streams, samples in found.items()
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
