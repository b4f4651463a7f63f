"""Demonstrations as padded batches, addressed by step: what makes a resumed run repeat itself exactly."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from measuring.chats import Source
from measuring.examples import Example, sources_of
from measuring.json_lines import DataError
from training.tasks import Task
from training.tokenizer import encode_answers, encode_prompts

SHARD_BATCHES = 64
NARROW_ROWS = 16
DRAWS = 20


@dataclass(frozen=True)
class Batch:
    """Right-padded prompts with their answers."""

    ids: Tensor
    """(B, T) int64."""
    answer: Tensor
    """(B, T) bool, True at t where the model at t predicts a token of the answer, ids[:, t + 1]."""
    comes_again: bool = False
    """Its rows come again in later epochs, so that a teacher's answer is worth keeping."""
    sources: Sequence[Source] = ()
    """What each row asks, where it is known."""

    @property
    def targets(self) -> Tensor:
        """(N,) the answers' tokens, in the order of `answer`'s True cells."""
        return self.ids.roll(-1, dims=1)[self.answer]

    @property
    def positions(self) -> int:
        """How many tokens the answers have together."""
        return int(self.answer.sum())

    def narrow(self) -> "Narrow":
        """The same rows, sorted by length, as batches that are as wide as their longest row.

        That leaves less padding to compute on.
        """
        count = len(self.ids) // NARROW_ROWS
        if count < 2:
            return Narrow([self], slice(None))
        places = torch.arange(1, self.ids.shape[1] + 1, device=self.ids.device)
        lengths = (self.answer * places).amax(1) + 1
        order = lengths.argsort()
        chunks = order.chunk(count)
        longest = lengths[torch.stack([rows[-1] for rows in chunks])].tolist()
        parts = []
        for rows, length in zip(chunks, longest, strict=True):
            width = rounded_up(length)
            parts.append(Batch(self.ids[rows, :width], self.answer[rows, :width]))
        return Narrow(parts, order.repeat_interleave(self.answer.sum(1)[order]).argsort(stable=True))

    def prompts(self) -> list[list[int]]:
        """Token ids of each row before its answer."""
        lengths = self.answer.int().argmax(1) + 1
        return [row[:n] for row, n in zip(self.ids.tolist(), lengths.tolist(), strict=True)]

    @property
    def answers(self) -> list[list[int]]:
        """Token ids of each row's answer."""
        lengths = self.answer.sum(1).tolist()
        read = zip(self.ids.tolist(), self.prompts(), lengths, strict=True)
        return [row[len(prompt) : len(prompt) + length] for row, prompt, length in read]

    def rows(self, places: Sequence[int]) -> "Batch":
        """Some of the rows."""
        return Batch(self.ids[list(places)], self.answer[list(places)])

    def replaced(self, places: Sequence[int], rows: "Batch", pad: int) -> "Batch":
        """With other rows in these places."""
        prompts = self.prompts()
        answers = self.answers
        for place, prompt, answer in zip(places, rows.prompts(), rows.answers, strict=True):
            prompts[place] = prompt
            answers[place] = answer
        return Batch.of(prompts, answers, pad).to(self.ids.device)

    def with_prompts(self, prompts: list[list[int]], pad: int) -> "Batch":
        """The same answers after other prompts; their positions keep their order."""
        return Batch.of(prompts, self.answers, pad).to(self.ids.device)

    def to(self, device: torch.device) -> "Batch":
        """On this device."""
        return replace(self, ids=self.ids.to(device), answer=self.answer.to(device))

    def parts(self, count: int) -> list["Batch"]:
        """`count` batches of equally many rows. Raises ValueError where that does not come out even."""
        if len(self.ids) % count:
            raise ValueError(f"a batch of {len(self.ids)} does not split into {count} equal parts")
        size = len(self.ids) // count
        parts = []
        for first in range(0, len(self.ids), size):
            rows = slice(first, first + size)
            parts.append(
                replace(self, ids=self.ids[rows], answer=self.answer[rows], sources=self.sources[rows])
            )
        return parts

    @classmethod
    def of(cls, prompts: list[list[int]], answers: list[list[int]], pad: int) -> Self:
        """Rows of prompt and answer, filled up with `pad`."""
        rows = []
        for prompt, tokens in zip(prompts, answers, strict=True):
            rows.append(prompt + tokens)
        width = rounded_up(max(map(len, rows)))
        ids = torch.full((len(rows), width), pad)
        answer = torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            answer[i, len(prompts[i]) - 1 : len(row) - 1] = True
        return cls(ids, answer)


class BatchLoss(NamedTuple):
    """What a method makes of a batch."""

    loss: Tensor
    """A scalar, the mean over the positions of the answers."""
    scalars: dict[str, Tensor]
    """To log."""


class Narrow(NamedTuple):
    """A batch in narrower parts, see `Batch.narrow`."""

    parts: list[Batch]
    order: Tensor | slice
    """(N,) brings the parts' answer positions, one part after the other, into the batch's order."""


def rounded_up(width: int) -> int:
    """Few distinct widths are friendlier to caches and compilers."""
    return -(-width // 8) * 8


class LeftPadded(NamedTuple):
    """Rows that all end in the last column."""

    ids: Tensor
    """(B, T) int64."""
    mask: Tensor
    """(B, T) int64, 0 is padding."""


def left_padded(rows: list[list[int]], pad: int, device: torch.device | None = None) -> LeftPadded:
    """The rows, filled up on the left with `pad`; on the CPU unless a device is given."""
    width = max(map(len, rows))
    ids = []
    mask = []
    for row in rows:
        free = width - len(row)
        ids.append([pad] * free + row)
        mask.append([0] * free + [1] * len(row))
    return LeftPadded(torch.tensor(ids, device=device), torch.tensor(mask, device=device))


class Demonstration(NamedTuple):
    """Token ids of one example."""

    prompt: list[int]
    answer: list[int]
    source: Source

    @property
    def tokens(self) -> int:
        """Of both together."""
        return len(self.prompt) + len(self.answer)


class Demonstrations:
    """Batch number `step` of a seeded stream of references; rows of similar length share a batch.

    Args:
        task: draws the examples.
        tokenizer: of the pair.
        batch: rows of a batch.
        seed: of the stream.
        longest: tokens of prompt and answer together; what is longer is left out. None: any number.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        batch: int,
        seed: int,
        longest: int | None = None,
    ) -> None:
        self._task = task
        self._tokenizer = tokenizer
        self._batch = batch
        self._seed = seed
        self._longest = longest
        self._shard = -1
        self._batches: list[Batch] = []

    def __getitem__(self, step: int) -> Batch:
        shard, place = divmod(step, SHARD_BATCHES)
        if self._shard != shard:
            self._batches = self._load(shard)
            self._shard = shard
        return self._batches[place]

    def _load(self, shard: int) -> list[Batch]:
        seed = self._seed * 1_000_003 + shard
        rng = random.Random(seed)
        rows = sorted(self._rows(self._task.train(seed), rng), key=lambda row: row.tokens)
        batches = []
        for first in range(0, len(rows), self._batch):
            prompts, answers, sources = zip(*rows[first : first + self._batch], strict=True)
            batch = Batch.of(list(prompts), list(answers), self._tokenizer.eos_token_id)
            batches.append(replace(batch, comes_again=self._task.is_finite, sources=sources))
        rng.shuffle(batches)
        return batches

    def _rows(self, stream: Iterator[Example], rng: random.Random) -> list[Demonstration]:
        """The next examples that are short enough, as many as a shard takes.

        Raises:
            DataError: nearly everything is too long.
        """
        wanted = self._batch * SHARD_BATCHES
        rows: list[Demonstration] = []
        for _ in range(DRAWS):
            examples = list(islice(stream, wanted))
            sources = sources_of(examples)
            prompts = encode_prompts(self._tokenizer, sources)
            answers = encode_answers(self._tokenizer, [_answer(example, rng) for example in examples])
            rows += filter(self._fits, map(Demonstration, prompts, answers, sources))
            if len(rows) >= wanted:
                return rows[:wanted]
        raise DataError(f"too few examples have at most {self._longest} tokens, prompt and answer together")

    def _fits(self, row: Demonstration) -> bool:
        return self._longest is None or row.tokens <= self._longest


def _answer(example: Example, rng: random.Random) -> str:
    """One of its right answers; nothing if none is known, as a model then writes its own."""
    return example.references.sample(rng) if example.references else ""
