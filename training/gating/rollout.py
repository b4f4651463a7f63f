"""The closed loop in process: student and teacher step together, and the gate decides who writes.

It follows the served path decision for decision, by the same `router.budget.Bucket`: no decision inside a
span, and spans end with the completion. So what is calibrated and measured here holds there.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from router.budget import Bucket, Budget
from router.gate import RandomGate, TeachersGate
from training.read_prompts import ReadPrompts
from training.reading import Stepper

ScoreFn = Callable[[Tensor], Tensor]
"""Raw student logits (B, V), taps included -> score (B,)."""

COMPACT = 0.7  # drop the finished rows from the batch when less than this share is left


ROWS = 512
"""Most completions that are written at once."""
CACHE = 1e9
"""Bytes of the keys and values of all completions that are written at once.

With buffers that grow, and what a model computes on the way, it takes three times that.
"""
FREE = 1 - 1e-6
"""Fraction of a bucket that never binds; at 1 itself one span covers the whole completion."""


@dataclass(frozen=True)
class Request:
    """A prompt, and on which terms the teacher is asked."""

    prompt: list[int]
    price: float = math.inf
    """Ask if score > price."""
    fraction: float = 0.0
    """Of the bucket that holds the request to its budget."""
    teacher_prompt: list[int] | None = None
    """What the teacher reads; None: the same. The student may read a budget in words besides."""
    max_tokens: int | None = None
    """Longest completion, if it is shorter than the loop's."""
    begun: list[int] = field(default_factory=list)
    """What stands between the prompt and the completion, for both models. Requests that go on after the same
    prompt share what was read of it.
    """


@dataclass
class Rollout:
    """A completion, and who wrote it."""

    tokens: list[int] = field(default_factory=list)
    """With the end-of-sequence token."""
    by_teacher: list[bool] = field(default_factory=list)
    """Who wrote each token."""
    starts: list[int] = field(default_factory=list)
    """Places of the spans' first tokens."""
    asked: list[int] = field(default_factory=list, compare=False)
    """Number of each span's teacher, from the cheapest to the dearest. Not known of a gateway's replies."""
    wanted: list[bool] = field(default_factory=list, compare=False)
    """What the gate said at each token, before exploration. A tree does not keep it."""

    @property
    def teacher_tokens(self) -> int:
        """How many tokens the teacher wrote."""
        return sum(self.by_teacher)

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """[start, end) of the teacher's tokens; calls that follow each other are one."""
        found = []
        end = 0
        for by_teacher, tokens in groupby(self.by_teacher):
            start = end
            end += len(list(tokens))
            if by_teacher:
                found.append((start, end))
        return found

    def alone_from(self, step: int) -> int:
        """Place after the teacher's last token before `step`."""
        while step > 0 and not self.by_teacher[step - 1]:
            step -= 1
        return step

    def written_by(self, teachers: int) -> list[int]:
        """How many tokens each of several teachers wrote, from the cheapest to the dearest."""
        counts = [0] * teachers
        asked = dict(zip(self.starts, self.asked, strict=True))
        writer = 0
        for place, by_teacher in enumerate(self.by_teacher):
            writer = asked.get(place, writer)
            counts[writer] += by_teacher
        return counts


@dataclass
class Draft:
    """A completion that is being written under its bucket."""

    bucket: Bucket
    longest: int
    """Tokens of the completion."""
    completion: Rollout
    span_left: int = 0
    """Tokens that the teacher still writes of the span that it was asked for."""
    writer: int = 0
    """Number of that teacher."""

    def write(self, own: int, theirs: Sequence[int], asks: bool, whom: int) -> int:
        """Append the next token, and return it.

        Args:
            own: the student's.
            theirs: of each teacher, from the cheapest to the dearest.
            asks: whether the gate wants a teacher; inside a span it is not heard.
            whom: number of the teacher that it wants.
        """
        length = len(self.completion.tokens)
        if asks and self.span_left == 0:
            grant = self.bucket.reserve(length, self.longest - length)
            if grant is not None:
                self.span_left = grant.tokens
                self.writer = whom
                self.completion.starts.append(length)
                self.completion.asked.append(whom)
        by_teacher = self.span_left > 0
        self.span_left -= int(by_teacher)
        token = theirs[self.writer] if by_teacher else own
        self.completion.tokens.append(token)
        self.completion.by_teacher.append(by_teacher)
        return token


@dataclass(frozen=True)
class Positions:
    """What one step saw, for the rows that were alive (R of them)."""

    row: Tensor
    """(R,) index of the request."""
    step: Tensor
    """(R,) tokens written so far."""
    states: Tensor
    """(R, H) the student's last hidden states."""
    own: Tensor
    """(R,) the student's next token."""
    theirs: Tensor
    """(R,) the teacher's next token."""
    surprisal: Tensor
    """(R,) -log p_T of the student's own next token, nats."""
    best: Tensor
    """(R,) -max log p_T, nats."""
    kl: Tensor
    """(R,) KL(pi || p_T), nats."""
    entropy: Tensor
    """(R,) of p_T, nats."""
    cheaper: Tensor
    """(R, K - 1) the next token of each cheaper teacher, if there are K of them."""
    lost: Tensor
    """(R, K - 1) log p_T of the teacher's next token less that of theirs, nats: it judges the others."""

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Positions":
        """With every column changed alike."""
        columns = {}
        for name, column in vars(self).items():
            columns[name] = change(column)
        return Positions(**columns)


def concatenate(parts: Sequence[Positions]) -> Positions:
    """All parts as one, in order."""
    columns = {}
    for column in fields(Positions):
        columns[column.name] = torch.cat([getattr(part, column.name) for part in parts])
    return Positions(**columns)


class _Rows(NamedTuple):
    """The requests of a batch (B of them) that are not dropped from it."""

    number: Tensor
    """(B,) index of the request."""
    price: Tensor
    """(B,)"""
    longest: Tensor
    """(B,) most tokens of its completion."""

    def at(self, places: Tensor) -> "_Rows":
        """Those at these places of the batch."""
        return _Rows(*(column[places] for column in self))


@dataclass(frozen=True)
class ClosedLoop:
    """A pair and how it works together."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    score: ScoreFn
    visible: int
    """Token ids below this may be written."""
    end: int
    """Id of the end of a sequence."""
    span_tokens: int = 1
    ask_tokens: int | None = None
    """Tokens of one call; None: a whole span."""
    max_tokens: int = 64
    """Longest completion."""
    temperature: float = 0.0
    """Of the student's own tokens, 0 is greedy; the teacher writes greedily."""
    explore: float = 0.0
    """Probability of asking if the gate would not, or of not asking if it would."""
    cheaper: tuple[PreTrainedModel, ...] = ()
    """Further teachers, from the cheapest to the dearest. `teacher` is dearer than all of them."""

    @torch.inference_mode()
    def write(
        self,
        requests: Sequence[Request],
        batch: int = ROWS,
        watch: Callable[[Positions], None] | None = None,
        kept: ReadPrompts | None = None,
    ) -> list[Rollout]:
        """Completions in the order of the requests.

        Args:
            requests: any number of them.
            batch: most that are written at once; fewer if their caches would take more than CACHE.
            watch: is shown every step's positions.
            kept: prompts that were read before; takes those that are read now.
        """
        done = [Rollout() for _ in requests]
        for rows in self.batches(requests, batch):
            self._write(requests, done, rows, watch, kept)
        return done

    def batches(self, requests: Sequence[Request], most: int = ROWS) -> Iterator[list[int]]:
        """Numbers of the requests that are written together, from the shortest prompts on.

        Args:
            requests: any number of them; those that are begun after the same prompt follow each other.
            most: at once; fewer if their caches would take more than CACHE.
        """
        first: dict[tuple[int, ...], int] = {}
        order = []
        for number, request in enumerate(requests):
            place = first.setdefault(tuple(request.prompt), number) if request.begun else number
            order.append((len(request.prompt), place, number))
        rows: list[int] = []
        for prompt, _, number in sorted(order):
            if len(rows) >= min(most, self.rows_of(prompt)):
                yield rows
                rows = []
            rows.append(number)
        if rows:
            yield rows

    def rows_of(self, prompt: int) -> int:
        """How many completions fit into CACHE, after prompts of this many tokens."""
        token = sum(map(cache_bytes, (self.student, *self.cheaper, self.teacher)))
        return max(1, int(CACHE / (token * (prompt + self.max_tokens))))

    def _write(
        self,
        requests: Sequence[Request],
        done: list[Rollout],
        rows: list[int],
        watch: Callable[[Positions], None] | None,
        kept: ReadPrompts | None,
    ) -> None:
        device = self.student.device
        asked = [requests[number] for number in rows]
        begun = [request.begun for request in asked]
        columns = (rows, [request.price for request in asked], [self._longest(request) for request in asked])
        batch = _Rows(*(torch.tensor(column, device=device) for column in columns))
        drafts = {number: self._draft(requests[number], done[number]) for number in rows}
        alive = torch.ones_like(batch.number, dtype=torch.bool)
        student = Stepper(self.student)
        (states, logits), mask = student.start([request.prompt for request in asked], begun, self.end, kept)
        read_by_teacher = [request.teacher_prompt or request.prompt for request in asked]
        teachers = [Stepper(model) for model in (*self.cheaper, self.teacher)]
        started = [teacher.start(read_by_teacher, begun, self.end, kept) for teacher in teachers]
        seen = started[-1].mask
        of_teachers = [reading.logits for reading, _ in started]
        for length in range(self.max_tokens):
            theirs = [written[:, : self.visible] for written in of_teachers]
            next_tokens = torch.stack([written.argmax(-1) for written in theirs], dim=1)
            own = self._choose(logits[:, : self.visible])
            if watch is not None:
                words = logits[:, : self.visible]
                cheaper = next_tokens[:, :-1]
                watch(observe(batch.number, length, states, words, own, theirs[-1], alive, cheaper))
            wants, whom = self._decided(logits, batch.price)
            asks = wants
            if self.explore:
                asks = wants ^ (torch.rand(wants.shape, device=device) < self.explore)
            token = self._written(drafts, batch.number, wants, asks, whom, own, next_tokens, alive)
            alive &= (token != self.end) & (length + 1 < batch.longest)
            left = int(alive.sum())
            if left == 0:
                return
            if left < COMPACT * len(alive):  # copying the caches at every step would cost more than it saves
                going = alive.nonzero().squeeze(1)
                for stepper in (student, *teachers):
                    stepper.keep(going)
                batch = batch.at(going)
                token = token[going]
                mask = mask[going]
                seen = seen[going]
                alive = alive[going]
            ids = token[:, None]
            mask = torch.cat((mask, torch.ones_like(ids)), dim=1)
            seen = torch.cat((seen, torch.ones_like(ids)), dim=1)
            states, logits = student.step(ids, mask)
            of_teachers = [teacher.step(ids, seen).logits for teacher in teachers]

    def _longest(self, request: Request) -> int:
        return min(self.max_tokens, request.max_tokens or self.max_tokens)

    def _draft(self, request: Request, completion: Rollout) -> Draft:
        bucket = Bucket(Budget(fraction=request.fraction), self.span_tokens, self.ask_tokens)
        return Draft(bucket, self._longest(request), completion)

    def _decided(self, logits: Tensor, price: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the gate asks (B,), and the number of the teacher (B,) that it means.

        A gate without an output for each means the dearest one; at random, any of them.
        """
        if isinstance(self.score, TeachersGate):
            worth = self.score.worth(logits)
            return self.score.common(worth) > price, self.score.margins(worth, price).argmax(-1)
        wants = self.score(logits) > price
        if self.cheaper and isinstance(self.score, RandomGate):
            return wants, torch.randint(len(self.cheaper) + 1, price.shape, device=price.device)
        return wants, torch.full_like(price, len(self.cheaper), dtype=torch.long)

    @staticmethod
    def _written(
        drafts: dict[int, Draft],
        row: Tensor,
        wants: Tensor,
        asks: Tensor,
        whom: Tensor,
        own: Tensor,
        theirs: Tensor,
        alive: Tensor,
    ) -> Tensor:
        """The next token (B,) of each draft that is alive; those that are not keep the student's."""
        tokens = []
        columns = torch.stack((row, wants.to(row.dtype), asks.to(row.dtype), whom, own), dim=1)
        columns = torch.cat((columns, theirs), dim=1)
        for number, wanted, asked, meant, mine, *foreign in columns[alive].tolist():
            tokens.append(drafts[number].write(mine, foreign, bool(asked), meant))
            drafts[number].completion.wanted.append(bool(wanted))
        written = own.clone()
        written[alive] = torch.tensor(tokens, device=own.device)
        return written

    def _choose(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(-1)
        return (logits / self.temperature).softmax(-1).multinomial(1).squeeze(1)


def cache_bytes(model: PreTrainedModel) -> int:
    """Of the keys and values of one token, at most: by layers and width."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(config.num_hidden_layers) * int(heads) * int(width) * model.dtype.itemsize


def with_gate(loop: ClosedLoop, score: ScoreFn, explore: float = 0.0) -> ClosedLoop:
    """The same pair with another gate."""
    return replace(loop, score=score, explore=explore)


def observe(
    row: Tensor,
    length: int,
    states: Tensor,
    student: Tensor,
    own: Tensor,
    teacher: Tensor,
    alive: Tensor,
    cheaper: Tensor,
) -> Positions:
    """What a step saw, on the CPU: all positions of a run together outgrow a GPU.

    Args:
        row: (B,) index of the request.
        length: tokens written so far.
        states: (B, H) the student's.
        student: (B, visible) logits.
        own: (B,) the student's next token.
        teacher: (B, visible) logits.
        alive: (B,) the rows to report.
        cheaper: (B, K - 1) the cheaper teachers' next tokens.
    """
    log_pi = student[alive].log_softmax(-1)
    log_p = teacher[alive].log_softmax(-1)
    best = log_p.amax(-1)
    seen = Positions(
        row=row[alive],
        step=torch.full_like(row[alive], length),
        states=states[alive],
        own=own[alive],
        theirs=teacher[alive].argmax(-1),
        surprisal=-log_p.gather(1, own[alive][:, None]).squeeze(1),
        best=-best,
        kl=(log_pi.exp() * (log_pi - log_p)).sum(-1),
        entropy=torch.special.entr(log_p.exp()).sum(-1),
        cheaper=cheaper[alive],
        lost=best[:, None] - log_p.gather(1, cheaper[alive]),
    )
    return seen.mapped(Tensor.cpu)
