"""Two models writing together, beside what each alone needs for its share of the tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from server.bench.plan import Plan
from server.bench.results import Row, Section, Spread, Table
from server.bench.servers import Sample
from server.bench.together import READ, STUDENT, TEACHER, measured


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


def run(plan: Plan) -> Section:
    together = plan.once(measured)
    network = network_seconds(together.samples[1][together.cooperative[-1]])  # with most calls
    rows: list[Row] = []
    splits: list[Row] = []
    for streams, samples in together.samples.items():
        rows += [_row(streams, side, samples) for side in together.cooperative]
        for side in together.cooperative:
            shares = [Split.of(sample, network if streams > 1 else None).shares for sample in samples[side]]
            split = {part: Spread.of(share[part] for share in shares) for part in shares[0]}
            splits.append({"streams": streams, "side": side} | split)
    about = (
        f"Teacher deepened to {plan.heavy_size} on one core, student on the other, examples of the pair, "
        f"greedy. {together.rounds} rounds, other examples in each, prefix caches emptied before every run."
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


def network_seconds(samples: Sequence[Sample]) -> float:
    """Seconds of a call outside the teacher's engine; ``samples``: of one stream, with many calls."""
    return median(Split.of(sample).network / max(1, sample.run.calls) for sample in samples)


def _row(streams: int, side: str, samples: dict[str, list[Sample]]) -> Row:
    runs: Sequence[Sample] = samples[side]
    read = [sum(a.prompt_tokens for a in s.run.answers) / s.run.seconds for s in samples[READ]]
    ideals = [
        Ideal.of(*quadruple) for quadruple in zip(runs, samples[STUDENT], samples[TEACHER], read, strict=True)
    ]
    walls = [sample.run.seconds for sample in runs]
    pairs = list(zip(walls, ideals, strict=True))
    return {
        "streams": streams,
        "side": side,
        "rate": Spread.of(s.run.teacher_tokens / s.run.tokens for s in runs),
        "tokens/s": Spread.of(s.run.tokens_per_second for s in runs),
        "teacher alone": Spread.of(s.run.tokens_per_second for s in samples[TEACHER]),
        "student alone": Spread.of(s.run.tokens_per_second for s in samples[STUDENT]),
        "wall / sum": Spread.of(wall / ideal.one_after_the_other for wall, ideal in pairs),
        "wall / side by side": Spread.of(wall / ideal.side_by_side for wall, ideal in pairs),
        "wall / with reading": Spread.of(wall / ideal.with_reading for wall, ideal in pairs),
        "calls/request": Spread.of(s.run.calls / len(s.run.answers) for s in runs),
        "positions read / once": Spread.of(
            s.teacher.read / max(1.0, ideal.reading * speed) if s.teacher else 0.0
            for s, ideal, speed in zip(runs, ideals, read, strict=True)
        ),
    }
