"""Two models writing together, beside what each alone needs for its share of the tokens."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from server.bench.plan import Plan, synthetic
from server.bench.results import Row, Section, Spread, Table
from server.bench.servers import LAST, Sample, Server, gateway, in_turn, measure, started, stock

RATES = (0.05, 0.1, 0.2, 0.3)
STREAMS = (1, 16)
SHIPPED, AHEAD, BLOCKS = "as shipped", "write_ahead: 2", "blocks of 128"
"""Set-ups: the demo's; calls that write on in case they are asked again; a teacher with vLLM's CPU blocks."""
READ_PROMPT = 256


@dataclass(frozen=True)
class Ideal:
    """What the tokens of one cooperative run would cost elsewhere: seconds at the same number of streams."""

    student: float
    """For the student alone, its tokens."""
    teacher: float
    """For the teacher alone, its tokens."""
    reading: float
    """For the teacher, to read every prompt and every token of the student once."""

    @classmethod
    def of(cls, run: Sample, student: Sample, teacher: Sample, read_per_second: float) -> "Ideal":
        """From one run of each in the same round, and the positions/s that the teacher reads."""
        asked = [answer for answer in run.run.answers if answer.calls]
        positions = sum(a.prompt_tokens + a.tokens - a.teacher_tokens for a in asked)
        return cls(
            student=(run.run.tokens - run.run.teacher_tokens) / student.run.tokens_per_second,
            teacher=run.run.teacher_tokens / teacher.run.tokens_per_second,
            reading=positions / read_per_second,
        )

    @property
    def one_after_the_other(self) -> float:
        return self.student + self.teacher

    @property
    def side_by_side(self) -> float:
        """Each on its own core, both busy all the time."""
        return max(self.student, self.teacher)

    @property
    def with_reading(self) -> float:
        return self.student + self.teacher + self.reading


@dataclass(frozen=True)
class Split:
    """Where the seconds of the requests went, summed over them; in order of a token's way."""

    student_decode: float
    student_first_step: float
    """Of every segment: reads what the teacher wrote, and a part of a block again; writes one token."""
    student_queue: float
    teacher_first_step: float
    """Of every call: reads what is new to the teacher, and a part of a block again; writes one token."""
    teacher_decode: float
    """Further tokens of a call."""
    teacher_queue: float
    """Scheduled later than its engine saw it."""
    teacher_busy: float
    """A call waits for the step that runs when it arrives, before its engine sees it; for its core, too."""
    network: float
    """HTTP on both sides, and the teacher's front end."""
    gateway: float
    """All the rest: the gateway's Python, and its HTTP towards the client."""

    @classmethod
    def of(cls, sample: Sample, network: float | None = None) -> "Split":
        """``network``: seconds of a call outside the teacher's engine where nobody else asks it, which then
        are all that counts as such; None where this sample is the only one that asks.
        """
        student, teacher = sample.work, sample.teacher
        if teacher is None:
            raise ValueError("a sample without a teacher")
        calls = sample.growth["wheels_teacher_call_seconds_sum"]
        latencies = sum(answer.end - answer.start for answer in sample.run.answers)
        inside = student.queue_seconds + student.prefill_seconds + student.decode_seconds
        outside = calls - (teacher.queue_seconds + teacher.prefill_seconds + teacher.decode_seconds)
        network = outside if network is None else min(outside, network * sample.run.calls)
        return cls(
            student_decode=student.decode_seconds,
            student_first_step=student.prefill_seconds,
            student_queue=student.queue_seconds,
            teacher_first_step=teacher.prefill_seconds,
            teacher_decode=teacher.decode_seconds,
            teacher_queue=teacher.queue_seconds,
            teacher_busy=outside - network,
            network=network,
            gateway=latencies - inside - calls,
        )

    @property
    def shares(self) -> dict[str, float]:
        total = sum(vars(self).values())
        return {name.replace("_", " "): seconds / total for name, seconds in vars(self).items()}


@dataclass(frozen=True)
class Variant:
    """A set-up at a rate."""

    setup: str
    rate: float

    def __str__(self) -> str:
        return f"{self.setup}, {self.rate:g}"


@dataclass(frozen=True)
class Behind:
    """A gateway and the teacher behind it."""

    gateway: Server
    teacher: Server


def run(plan: Plan) -> Section:
    heavy = plan.heavy
    teacher = stock(heavy.teacher, plan.work, "teacher", LAST)
    coarse = stock(heavy.teacher, plan.work, "teacher-128", LAST, "--block-size", "128")
    flags = ("--aim", "rate")
    gateways = [
        gateway(heavy, teacher, plan.work, *flags),
        gateway(heavy, teacher, plan.work, *flags, "--write-ahead", "2", name="ahead"),
        gateway(heavy, coarse, plan.work, *flags, name="coarse"),
    ]
    with started([teacher, coarse], gateways) as (fine, rough, ours, ahead, ours_rough):
        setups = {SHIPPED: Behind(ours, fine), AHEAD: Behind(ahead, fine), BLOCKS: Behind(ours_rough, rough)}
        rows, splits = asyncio.run(_all(setups, plan))
    about = (
        "Teacher deepened to 103 M parameters on one core, student on the other, examples of the pair, "
        f"greedy; `--aim rate`. {plan.rounds} rounds, other examples in each, prefix caches emptied before "
        "every run."
    )
    return Section(
        {
            "ideal": Table(
                "Cooperation beside its ideal",
                rows,
                f"{about} *Sum*: what each alone, at as many streams, needs for the tokens that it wrote "
                "here; *side by side*: the longer of the two; *with reading*: the sum, and every position "
                "that the teacher did not write read by it once.",
            ),
            "split": Table(
                "Where a request's time goes",
                splits,
                "Shares of latencies. Network: HTTP and the teacher's front end, by what a call "
                "takes outside its engine at one stream; what it takes beyond is *teacher busy*.",
            ),
        }
    )


async def _all(setups: dict[str, Behind], plan: Plan) -> tuple[list[Row], list[Row]]:
    rows: list[Row] = []
    splits: list[Row] = []
    network: float | None = None
    shipped = setups[SHIPPED]
    rates = RATES[1::2] if plan.quick else RATES
    variants = [Variant(SHIPPED, rate) for rate in rates]
    variants += [Variant(AHEAD, RATES[1]), Variant(BLOCKS, RATES[1])]
    for streams in STREAMS:
        count = _count(streams, plan.quick)

        async def alone(server: Server, turn: int, streams: int = streams, count: int = count) -> Sample:
            return await measure(server, plan.chats(count, turn), streams)

        async def both(variant: Variant, turn: int, streams: int = streams, count: int = count) -> Sample:
            pair = setups[variant.setup]
            calls = plan.chats(count, turn)
            return await measure(pair.gateway.at(variant.rate), calls, streams, teacher=pair.teacher)

        async def read(turn: int, streams: int = streams) -> Sample:
            return await measure(shipped.teacher, synthetic(max(4, streams), READ_PROMPT, 1, turn), streams)

        for setup in setups:
            await both(Variant(setup, RATES[-1]), 0, count=streams)  # the first steps are slow
        samples = await in_turn(
            {
                "student": partial(alone, shipped.gateway),
                "teacher": partial(alone, shipped.teacher),
                "read": read,
            }
            | {str(variant): partial(both, variant) for variant in variants},
            plan.rounds,
        )
        for variant in variants:
            runs = samples[str(variant)]
            rows.append(_row(streams, variant, runs, samples))
            found = [Split.of(sample, network) for sample in runs]
            if streams == 1 and variant == Variant(SHIPPED, RATES[-1]):  # most calls
                network = median(
                    split.network / max(1, sample.run.calls)
                    for split, sample in zip(found, runs, strict=True)
                )
            shares = [split.shares for split in found]
            split = {name: Spread.of(share[name] for share in shares) for name in shares[0]}
            splits.append({"streams": streams, "budget": variant.rate, "set-up": variant.setup} | split)
    return rows, splits


def _count(streams: int, quick: bool) -> int:
    """Requests of one run."""
    if streams == 1:
        return 2 if quick else 3
    return streams


def _row(streams: int, variant: Variant, runs: Sequence[Sample], samples: dict[str, list[Sample]]) -> Row:
    read = [sum(a.prompt_tokens for a in s.run.answers) / s.run.seconds for s in samples["read"]]
    ideals = [
        Ideal.of(*quadruple)
        for quadruple in zip(runs, samples["student"], samples["teacher"], read, strict=True)
    ]
    walls = [sample.run.seconds for sample in runs]
    pairs = list(zip(walls, ideals, strict=True))
    return {
        "streams": streams,
        "budget": variant.rate,
        "set-up": variant.setup,
        "rate": Spread.of(s.run.teacher_tokens / s.run.tokens for s in runs),
        "tokens/s": Spread.of(s.run.tokens_per_second for s in runs),
        "teacher alone": Spread.of(s.run.tokens_per_second for s in samples["teacher"]),
        "student alone": Spread.of(s.run.tokens_per_second for s in samples["student"]),
        "wall / sum": Spread.of(wall / ideal.one_after_the_other for wall, ideal in pairs),
        "wall / side by side": Spread.of(wall / ideal.side_by_side for wall, ideal in pairs),
        "wall / with reading": Spread.of(wall / ideal.with_reading for wall, ideal in pairs),
        "calls/request": Spread.of(s.run.calls / len(s.run.answers) for s in runs),
        "positions read / once": Spread.of(
            s.teacher.read / max(1.0, ideal.reading * speed) if s.teacher else 0.0
            for s, ideal, speed in zip(runs, ideals, read, strict=True)
        ),
    }
