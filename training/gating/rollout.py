"""The closed loop in process: student and teacher step together, and the gate decides who writes.

It makes the same decisions as the gateway, with the same `router.budget.Bucket`: there is no decision inside
a span, and spans end with the completion. So prices and rates that are measured here hold in the gateway.
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
"""Computes scores (B,) from the student's raw logits (B, V), taps included."""

COMPACT = 0.7
"""Share of unfinished rows below which finished rows are dropped from the batch."""


ROWS = 512
"""Most completions that are written at once."""
CACHE = 1e9
"""Most bytes of keys and values for all completions that are written at once.

Growing buffers and the models' intermediate values take memory as well: three times this in all.
"""
FREE = 1 - 1e-6
"""Fraction of a bucket that never binds. At exactly 1, a single span would cover the whole completion."""


@dataclass(frozen=True)
class Request:
    """A prompt, and the terms on which the teacher is asked."""

    prompt: list[int]
    """The prompt's token ids, as the student reads them."""
    price: float = math.inf
    """Price: the gate asks if its score is above this."""
    fraction: float = 0.0
    """Fraction of the request's bucket."""
    teacher_prompt: list[int] | None = None
    """The prompt's token ids as the teacher reads them, without budget words; None: the same."""
    max_tokens: int | None = None
    """Longest completion, in tokens, if it is shorter than the loop's."""
    begun: list[int] = field(default_factory=list)
    """Tokens between prompt and completion, which both models read. Requests with the same prompt share its
    keys and values.
    """


@dataclass
class Rollout:
    """A completion, and who wrote each token."""

    tokens: list[int] = field(default_factory=list)
    """Tokens of the completion, including the end-of-sequence token."""
    by_teacher: list[bool] = field(default_factory=list)
    """Whether the teacher wrote each token."""
    starts: list[int] = field(default_factory=list)
    """Places of the spans' first tokens."""
    asked: list[int] = field(default_factory=list, compare=False)
    """Number of each span's teacher, from the cheapest to the dearest; empty for a gateway's replies."""
    wanted: list[bool] = field(default_factory=list, compare=False)
    """Whether the gate wanted to ask at each token, before exploration; empty for walks in a tree."""

    @property
    def teacher_tokens(self) -> int:
        """Number of tokens that the teacher wrote."""
        return sum(self.by_teacher)

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """[start, end) of each run of teacher tokens; calls that follow each other make one run."""
        found = []
        end = 0
        for by_teacher, tokens in groupby(self.by_teacher):
            start = end
            end += len(list(tokens))
            if by_teacher:
                found.append((start, end))
        return found

    def alone_from(self, step: int) -> int:
        """Place after the teacher's last token before `step`; 0 if there is none."""
        while step > 0 and not self.by_teacher[step - 1]:
            step -= 1
        return step

    def written_by(self, teachers: int) -> list[int]:
        """Number of tokens that each of several teachers wrote, from the cheapest to the dearest."""
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
    """Most tokens in the completion."""
    completion: Rollout
    span_left: int = 0
    """Number of tokens that the teacher still writes in the present span."""
    writer: int = 0
    """Number of the teacher that writes the present span."""

    def write(self, own: int, theirs: Sequence[int], asks: bool, whom: int) -> int:
        """Append the next token, and return it.

        Args:
            own: the student's next token.
            theirs: the next token of each teacher, from the cheapest to the dearest.
            asks: whether the gate asks a teacher; ignored inside a span.
            whom: number of the teacher that the gate asks.
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
    """The positions of one step, for the R rows that are not finished."""

    row: Tensor
    """(R,) index of the request."""
    step: Tensor
    """(R,) number of tokens written so far."""
    states: Tensor
    """(R, H) the student's last hidden states."""
    own: Tensor
    """(R,) the student's next token."""
    theirs: Tensor
    """(R,) the teacher's next token."""
    surprisal: Tensor
    """(R,) -log p_T of the student's own next token, in nats."""
    best: Tensor
    """(R,) -max log p_T, in nats."""
    kl: Tensor
    """(R,) KL(pi || p_T), in nats."""
    entropy: Tensor
    """(R,) entropy of p_T, in nats."""
    cheaper: Tensor
    """(R, K - 1) the next token of each cheaper teacher; K is the number of all teachers."""
    lost: Tensor
    """(R, K - 1) log p_T of the teacher's own next token minus that of each cheaper teacher's, in nats."""

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Positions":
        """The positions with `change` applied to every column."""
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
    """The B requests that are in the batch."""

    number: Tensor
    """(B,) index of the request."""
    price: Tensor
    """(B,) price of the request."""
    longest: Tensor
    """(B,) most tokens in its completion."""

    def at(self, places: Tensor) -> "_Rows":
        """The requests at these places of the batch."""
        return _Rows(*(column[places] for column in self))


@dataclass(frozen=True)
class ClosedLoop:
    """Student and teachers, and the terms on which they write together."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    score: ScoreFn
    """The gate."""
    visible: int
    """Token ids below this may be written."""
    end: int
    """Id of the end-of-sequence token."""
    span_tokens: int = 1
    """Longest span, in tokens."""
    ask_tokens: int | None = None
    """Number of tokens in one call; None: a whole span."""
    max_tokens: int = 64
    """Longest completion, in tokens."""
    temperature: float = 0.0
    """Temperature of the student's own tokens; 0 is greedy. Teachers always write greedily."""
    explore: float = 0.0
    """Probability that a decision of the gate is reversed."""
    cheaper: tuple[PreTrainedModel, ...] = ()
    """Cheaper teachers, from the cheapest to the dearest. `teacher` is dearer than all of them."""

    @torch.inference_mode()
    def write(
        self,
        requests: Sequence[Request],
        batch: int = ROWS,
        watch: Callable[[Positions], None] | None = None,
        kept: ReadPrompts | None = None,
    ) -> list[Rollout]:
        """Write the completions of the requests, and return them in the order of the requests.

        Args:
            requests: any number of requests.
            batch: most requests to write at once; fewer if their caches would take more than CACHE.
            watch: is called with the positions of every step.
            kept: prompts that were read before; the prompts read now are added to it.
        """
        done = [Rollout() for _ in requests]
        for rows in self.batches(requests, batch):
            self._write(requests, done, rows, watch, kept)
        return done

    def batches(self, requests: Sequence[Request], most: int = ROWS) -> Iterator[list[int]]:
        """Numbers of the requests to write together, the shortest prompts first.

        Begun requests with the same prompt follow each other.

        Args:
            requests: any number of requests.
            most: most requests to write at once; fewer if their caches would take more than CACHE.
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
        """Number of completions that fit into CACHE, after prompts of `prompt` tokens."""
        return max(1, int(CACHE / (self.token_bytes * (prompt + self.max_tokens))))

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all models."""
        return sum(map(cache_bytes, (self.student, *self.cheaper, self.teacher)))

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
            if left < COMPACT * len(alive):  # copying caches at every step would cost more
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
        """Whether the gate asks (B,), and the number (B,) of the teacher that it asks.

        A gate with one output asks the dearest teacher; the random gate asks any teacher.
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
        """Write and return the next tokens (B,) of unfinished drafts; finished rows get the student's."""
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
    """Upper bound of the bytes of one token's keys and values, from the model's layers and widths."""
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
    """The positions of one step, on the CPU, because all positions of a run may not fit on a GPU.

    Args:
        row: (B,) index of the request.
        length: number of tokens written so far.
        states: (B, H) the student's last hidden states.
        student: (B, visible) the student's logits.
        own: (B,) the student's next token.
        teacher: (B, visible) the teacher's logits.
        alive: (B,) bool, the rows to report.
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
