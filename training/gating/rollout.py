"""The closed loop in process: student and teacher step together over a batch, and the gate decides who
writes.

It follows the served path decision for decision, by the same `router.budget.Bucket`: no decision inside a
span, and spans end with the completion. So what is calibrated and measured here holds there.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from router.budget import Bucket, Budget
from training.batches import left_padded
from training.reading import Stepper

ScoreFn = Callable[[Tensor], Tensor]
"""Raw student logits (B, V), taps included -> score (B,)."""

COMPACT = 0.7  # drop the finished rows from the batch when less than this share is left


FREE = 1 - 1e-6
"""Fraction of a bucket that never binds; at 1 itself one span covers the whole completion."""


@dataclass(frozen=True)
class Request:
    """price: ask where score > price. fraction: of the bucket that holds the request to its budget. hidden:
    first tokens of the prompt that the teacher does not see, its budget in words.
    """

    prompt: list[int]
    price: float = math.inf
    fraction: float = 0.0
    hidden: int = 0


@dataclass
class Rollout:
    """tokens: with the end-of-sequence token. by_teacher: who wrote each. starts: where the spans start."""

    tokens: list[int] = field(default_factory=list)
    by_teacher: list[bool] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    @property
    def teacher_tokens(self) -> int:
        return sum(self.by_teacher)


@dataclass
class Draft:
    """A completion that is being written under its bucket."""

    bucket: Bucket
    longest: int
    """Tokens of the completion."""
    completion: Rollout
    span_left: int = 0
    """Tokens that the teacher still writes of the span that it was asked for."""

    def write(self, own: int, theirs: int, asks: bool) -> int:
        """Append the next token, and return it.

        Args:
            own: the student's.
            theirs: the teacher's.
            asks: whether the gate wants the teacher; inside a span it is not heard.
        """
        length = len(self.completion.tokens)
        if asks and self.span_left == 0:
            grant = self.bucket.reserve(length, self.longest - length)
            if grant is not None:
                self.span_left = grant.tokens
                self.completion.starts.append(length)
        by_teacher = self.span_left > 0
        self.span_left -= int(by_teacher)
        token = theirs if by_teacher else own
        self.completion.tokens.append(token)
        self.completion.by_teacher.append(by_teacher)
        return token


@dataclass(frozen=True)
class Positions:
    """What one step saw, for the rows that were alive (R of them).

    row: (R,) index of the request; step: (R,) tokens written so far; states: (R, H) the student's last hidden
    states; own, theirs: (R,) the next token of student and teacher;
    surprisal: (R,) -log p_T of the student's own next token; best: (R,) -max log p_T; kl: (R,) KL(pi || p_T);
    entropy: (R,) of p_T. All in nats.
    """

    row: Tensor
    step: Tensor
    states: Tensor
    own: Tensor
    theirs: Tensor
    surprisal: Tensor
    best: Tensor
    kl: Tensor
    entropy: Tensor


def concatenate(parts: Sequence[Positions]) -> Positions:
    return Positions(
        **{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Positions)}
    )


@dataclass(frozen=True)
class ClosedLoop:
    """A pair and how it works together.

    visible: token ids below this may be written. temperature: of the student's own tokens, 0 = greedy; the
    teacher writes greedily. explore: probability of asking where the gate would not, or not asking where it
    would.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    score: ScoreFn
    visible: int
    end: int
    span_tokens: int = 1
    ask_tokens: int | None = None
    max_tokens: int = 64
    temperature: float = 0.0
    explore: float = 0.0

    @torch.inference_mode()
    def write(
        self, requests: Sequence[Request], batch: int = 512, watch: Callable[[Positions], None] | None = None
    ) -> list[Rollout]:
        """Completions in the order of the requests. `watch` is shown every step's positions."""
        done = [Rollout() for _ in requests]
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
        for at in range(0, len(order), batch):
            self._write(requests, done, order[at : at + batch], watch)
        return done

    def _write(
        self,
        requests: Sequence[Request],
        done: list[Rollout],
        rows: list[int],
        watch: Callable[[Positions], None] | None,
    ) -> None:
        device = self.student.device
        ids, mask = (x.to(device) for x in left_padded([requests[row].prompt for row in rows], self.end))
        hidden = torch.tensor([[requests[row].hidden] for row in rows], device=device)
        seen = mask * (mask.cumsum(-1) > hidden)  # by the teacher
        row = torch.tensor(rows, device=device)
        price = torch.tensor([requests[i].price for i in rows], device=device)
        drafts = {i: self._draft(requests[i].fraction, done[i]) for i in rows}
        alive = torch.ones_like(row, dtype=torch.bool)
        student, teacher = Stepper(self.student), Stepper(self.teacher)
        for length in range(self.max_tokens):
            states, logits = student.step(ids, mask)
            _, teacher_logits = teacher.step(ids, seen)
            own = self._choose(logits[:, : self.visible])
            theirs = teacher_logits[:, : self.visible]
            if watch is not None:
                watch(observe(row, length, states, logits[:, : self.visible], own, theirs, alive))
            wants = self.score(logits) > price
            if self.explore:
                wants ^= torch.rand(wants.shape, device=device) < self.explore
            token = own.clone()
            living = (x[alive] for x in (row, wants, own, theirs.argmax(-1)))
            token[alive] = self._written(drafts, *living)
            alive &= token != self.end
            left = int(alive.sum())
            if left == 0:
                return
            if left < COMPACT * len(alive):  # copying the caches at every step would cost more than it saves
                kept = alive.nonzero().squeeze(1)
                student.keep(kept)
                teacher.keep(kept)
                row, price, token, mask, seen, alive = (
                    x[kept] for x in (row, price, token, mask, seen, alive)
                )
            ids = token[:, None]
            mask = torch.cat((mask, torch.ones_like(ids)), dim=1)
            seen = torch.cat((seen, torch.ones_like(ids)), dim=1)

    def _draft(self, fraction: float, completion: Rollout) -> Draft:
        bucket = Bucket(Budget(fraction=fraction), self.span_tokens, self.ask_tokens)
        return Draft(bucket, self.max_tokens, completion)

    @staticmethod
    def _written(drafts: dict[int, Draft], row: Tensor, wants: Tensor, own: Tensor, theirs: Tensor) -> Tensor:
        """The next token (R,) of each draft."""
        tokens = []
        columns = zip(row.tolist(), wants.tolist(), own.tolist(), theirs.tolist(), strict=True)
        for number, asks, mine, foreign in columns:
            tokens.append(drafts[number].write(mine, foreign, asks))
        return torch.tensor(tokens, device=own.device)

    def _choose(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(-1)
        return (logits / self.temperature).softmax(-1).multinomial(1).squeeze(1)


def with_gate(loop: ClosedLoop, score: ScoreFn, explore: float = 0.0) -> ClosedLoop:
    return replace(loop, score=score, explore=explore)


def observe(
    row: Tensor, length: int, states: Tensor, student: Tensor, own: Tensor, teacher: Tensor, alive: Tensor
) -> Positions:
    """student, teacher: (B, visible) logits; alive: (B,) the rows to report, which go to the CPU: all
    positions of a run together outgrow a GPU.
    """
    row, states, student, own, teacher = (x[alive] for x in (row, states, student, own, teacher))
    log_pi, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    seen = Positions(
        row=row,
        step=torch.full_like(row, length),
        states=states,
        own=own,
        theirs=teacher.argmax(-1),
        surprisal=-log_p.gather(1, own[:, None]).squeeze(1),
        best=-log_p.amax(-1),
        kl=(log_pi.exp() * (log_pi - log_p)).sum(-1),
        entropy=torch.special.entr(log_p.exp()).sum(-1),
    )
    return Positions(**{name: column.cpu() for name, column in vars(seen).items()})
