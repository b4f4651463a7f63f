"""The speed of two models writing together, compared with each model alone writing its share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from operator import itemgetter
from statistics import median

from server.bench.plan import Plan
from server.bench.results import Columns, Row, Section, Table, spreads
from server.bench.servers import Sample
from server.bench.together import READ, STUDENT, TEACHER, Together, measured


@dataclass(frozen=True)
class Ideal:
    """Seconds that the tokens of one cooperative run would take elsewhere, at the same number of streams."""

    student: float
    """Seconds for the student's tokens, if the student writes alone."""
    teacher: float
    """Seconds for the teacher's tokens, if the teacher writes alone."""
    positions: int
    """Positions that the teacher has to read once: prompts and student tokens of requests with calls."""
    reading: float
    """Seconds that the teacher takes to read these positions."""

    @classmethod
    def from_samples(cls, run: Sample, student: Sample, teacher: Sample, read_per_second: float) -> "Ideal":
        """The ideal by one run of each side in a round, and by the teacher's reading speed in positions/s."""
        positions = 0
        for answer in run.run.answers:
            if answer.calls:
                positions += answer.prompt_tokens + answer.tokens - answer.teacher_tokens
        return cls(
            student=(run.run.tokens - run.run.teacher_tokens) / student.run.tokens_per_second,
            teacher=run.run.teacher_tokens / teacher.run.tokens_per_second,
            positions=positions,
            reading=positions / read_per_second,
        )

    @property
    def one_after_the_other(self) -> float:
        """Seconds for the student's tokens and then the teacher's."""
        return self.student + self.teacher

    @property
    def side_by_side(self) -> float:
        """Seconds if each model has its own core, and both are busy all the time."""
        return max(self.student, self.teacher)

    @property
    def with_reading(self) -> float:
        """Seconds for one after the other, plus the seconds for the teacher's reading."""
        return self.student + self.teacher + self.reading


@dataclass(frozen=True)
class Split:
    """Parts of the requests' seconds, summed over all requests, in the order of a token's way."""

    student_decode: float
    student_first_step: float
    """First step of every segment: reads the teacher's tokens and a part of a block; writes one token."""
    student_queue: float
    teacher_first_step: float
    """First step of every call: reads the student's tokens and a part of a block; writes one token."""
    teacher_decode: float
    """Steps for the further tokens of a call."""
    teacher_queue: float
    """Time from a call's arrival at the engine until it is scheduled."""
    teacher_busy: float
    """Time before the engine sees a call: it waits for the running step to end, and for the core."""
    network: float
    """Time of HTTP on both sides, and of the teacher's front end."""
    gateway: float
    """The remaining time: the gateway's Python, and its HTTP towards the client."""

    @classmethod
    def from_sample(cls, sample: Sample, network_per_call: float | None = None) -> "Split":
        """The split of one run.

        Args:
            sample: the run.
            network_per_call: seconds of a call outside the teacher's engine, without other calls. What a call
                takes beyond them counts as *teacher busy*. None: this run has no concurrent calls.

        Raises:
            ValueError: the sample has no teacher.
        """
        student = sample.work
        teacher = sample.teacher
        if teacher is None:
            raise ValueError("a sample without a teacher")
        calls = sample.growth["wheels_teacher_call_seconds_sum"]
        inside = student.queue_seconds + student.prefill_seconds + student.decode_seconds
        outside = calls - (teacher.queue_seconds + teacher.prefill_seconds + teacher.decode_seconds)
        network = outside
        if network_per_call is not None:
            network = min(outside, network_per_call * sample.run.calls)
        return cls(
            student_decode=student.decode_seconds,
            student_first_step=student.prefill_seconds,
            student_queue=student.queue_seconds,
            teacher_first_step=teacher.prefill_seconds,
            teacher_decode=teacher.decode_seconds,
            teacher_queue=teacher.queue_seconds,
            teacher_busy=outside - network,
            network=network,
            gateway=sum(sample.run.latencies) - inside - calls,
        )

    @property
    def shares(self) -> dict[str, float]:
        """Each part's share of the whole, by its name with spaces."""
        total = sum(vars(self).values())
        return {_title(name): seconds / total for name, seconds in vars(self).items()}


def _title(part: str) -> str:
    return part.replace("_", " ")


def _share_columns() -> Columns[Mapping[str, float]]:
    columns: dict[str, itemgetter[str]] = {}
    for part in fields(Split):
        title = _title(part.name)
        columns[title] = itemgetter(title)
    return columns


SHARES = _share_columns()


@dataclass(frozen=True)
class Round:
    """Cooperation and each model alone, one after the other on the same examples."""

    together: Sample
    student: Sample
    teacher: Sample
    ideal: Ideal

    @property
    def wall(self) -> float:
        """Seconds that the cooperation took."""
        return self.together.run.seconds

    @property
    def read_over_once(self) -> float:
        """Positions that the teacher read, divided by those that it had to read once."""
        if self.together.teacher is None:
            return 0.0
        return self.together.teacher.read / max(1, self.ideal.positions)


COLUMNS: Columns[Round] = {
    "rate": lambda each: each.together.run.teacher_rate,
    "tokens/s": lambda each: each.together.run.tokens_per_second,
    "teacher alone": lambda each: each.teacher.run.tokens_per_second,
    "student alone": lambda each: each.student.run.tokens_per_second,
    "wall / sum": lambda each: each.wall / each.ideal.one_after_the_other,
    "wall / side by side": lambda each: each.wall / each.ideal.side_by_side,
    "wall / with reading": lambda each: each.wall / each.ideal.with_reading,
    "calls/request": lambda each: each.together.run.calls / len(each.together.run.answers),
    "positions read / once": lambda each: each.read_over_once,
}


def run(plan: Plan) -> Section:
    """Cooperation compared with its ideal, and where its time goes."""
    together = plan.once(measured)
    about = (
        f"Teacher deepened to {plan.heavy_size} on one core, student on the other, examples of the pair, "
        f"greedy. {together.rounds} rounds, other examples in each, prefix caches emptied before every run."
    )
    return Section(
        {
            "ideal": Table(
                "Cooperation compared with its ideal",
                _ideal_rows(together),
                f"{about} *Sum*: what each alone, at as many streams, needs for the tokens that it wrote "
                "here; *side by side*: the longer of the two; *with reading*: the sum, and every position "
                "that the teacher did not write read by it once.",
            ),
            "split": Table(
                "Where a request's time goes",
                _split_rows(together),
                "Shares of latencies. Network: HTTP and the teacher's front end, by what a call "
                "takes outside its engine at one stream; what it takes beyond is *teacher busy*.",
            ),
        }
    )


def _ideal_rows(together: Together) -> list[Row]:
    rows: list[Row] = []
    for streams, samples in together.samples.items():
        for side in together.cooperative:
            rounds = _rounds(side, samples)
            rows.append({"streams": streams, "side": side, **spreads(rounds, COLUMNS)})
    return rows


def _rounds(side: str, samples: Mapping[str, Sequence[Sample]]) -> list[Round]:
    alone = zip(samples[STUDENT], samples[TEACHER], samples[READ], strict=True)
    rounds: list[Round] = []
    for cooperation, (student, teacher, read) in zip(samples[side], alone, strict=True):
        speed = read.run.prompt_tokens / read.run.seconds
        ideal = Ideal.from_samples(cooperation, student, teacher, speed)
        rounds.append(Round(cooperation, student, teacher, ideal))
    return rounds


def _split_rows(together: Together) -> list[Row]:
    most_calls = together.cooperative[-1]
    network = network_seconds(together.samples[1][most_calls])
    rows: list[Row] = []
    for streams, samples in together.samples.items():
        for side in together.cooperative:
            shares: list[Mapping[str, float]] = []
            for sample in samples[side]:
                shares.append(Split.from_sample(sample, network if streams > 1 else None).shares)
            rows.append({"streams": streams, "side": side, **spreads(shares, SHARES)})
    return rows


def network_seconds(samples: Sequence[Sample]) -> float:
    """Seconds of a call outside the teacher's engine.

    Args:
        samples: samples at one stream, with many calls.
    """
    return median(Split.from_sample(sample).network / max(1, sample.run.calls) for sample in samples)
