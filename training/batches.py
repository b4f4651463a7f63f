"""Demonstrations as padded batches, addressed by step, so that a resumed run repeats itself exactly."""

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
"""Number of batches that are drawn and sorted by length together."""
NARROW_ROWS = 16
"""Least mean number of rows in the narrow parts of a batch."""
DRAWS = 20
"""Most draws for one shard, before so few examples are short enough that the data counts as unusable."""


@dataclass(frozen=True)
class Batch:
    """Right-padded prompts with their answers."""

    ids: Tensor
    """(B, T) int64, token ids."""
    answer: Tensor
    """(B, T) bool, True at each t at which the model predicts a token of the answer, ids[:, t + 1]."""
    comes_again: bool = False
    """Whether its rows come again in later epochs, so that a teacher's answer is worth keeping."""
    sources: Sequence[Source] = ()
    """The source of each row, for batches of demonstrations; else empty."""

    @property
    def targets(self) -> Tensor:
        """(N,) the answers' tokens, in the order of `answer`'s True cells."""
        return self.ids.roll(-1, dims=1)[self.answer]

    @property
    def positions(self) -> int:
        """Number of tokens in all answers together."""
        return int(self.answer.sum())

    def narrow(self) -> "Narrow":
        """The same rows, sorted by length and split into batches as wide as their longest row.

        So models compute on less padding.
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
        """The token ids before the answer of each row."""
        lengths = self.answer.int().argmax(1) + 1
        return [row[:n] for row, n in zip(self.ids.tolist(), lengths.tolist(), strict=True)]

    @property
    def answers(self) -> list[list[int]]:
        """The token ids of each row's answer."""
        lengths = self.answer.sum(1).tolist()
        read = zip(self.ids.tolist(), self.prompts(), lengths, strict=True)
        return [row[len(prompt) : len(prompt) + length] for row, prompt, length in read]

    def rows(self, places: Sequence[int]) -> "Batch":
        """A batch of the rows at these places."""
        return Batch(self.ids[list(places)], self.answer[list(places)])

    def replaced(self, places: Sequence[int], rows: "Batch", pad: int) -> "Batch":
        """The batch with the rows at these places replaced by `rows`; `pad` is the id to fill up with."""
        prompts = self.prompts()
        answers = self.answers
        for place, prompt, answer in zip(places, rows.prompts(), rows.answers, strict=True):
            prompts[place] = prompt
            answers[place] = answer
        return Batch.of(prompts, answers, pad).to(self.ids.device)

    def with_prompts(self, prompts: list[list[int]], pad: int) -> "Batch":
        """The batch with other prompts before the same answers, whose positions keep their order."""
        return Batch.of(prompts, self.answers, pad).to(self.ids.device)

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on this device."""
        return replace(self, ids=self.ids.to(device), answer=self.answer.to(device))

    def parts(self, count: int) -> list["Batch"]:
        """`count` batches with equal numbers of rows. Raises ValueError if the rows do not split evenly."""
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
        """A batch whose rows are a prompt and its answer, filled up with `pad`."""
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
    """The loss of a batch."""

    loss: Tensor
    """A scalar, the mean over the positions of the answers."""
    scalars: dict[str, Tensor]
    """Scalars to log, by name."""


class Narrow(NamedTuple):
    """A batch in narrower parts, see `Batch.narrow`."""

    parts: list[Batch]
    order: Tensor | slice
    """(N,) index that brings the parts' answer positions, joined part after part, into the batch's order."""


def rounded_up(width: int) -> int:
    """The width rounded up to a multiple of 8: caches and compilers prefer few distinct widths."""
    return -(-width // 8) * 8


class LeftPadded(NamedTuple):
    """Rows padded on the left, so that all end in the last column."""

    ids: Tensor
    """(B, T) int64, token ids."""
    mask: Tensor
    """(B, T) int64; 0 is padding."""


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
    """Prompt and answer of one example, as token ids, and its source."""

    prompt: list[int]
    answer: list[int]
    source: Source

    @property
    def tokens(self) -> int:
        """Number of tokens of prompt and answer together."""
        return len(self.prompt) + len(self.answer)


class Demonstrations:
    """Batches of a seeded stream of references, by step; rows of similar length share a batch.

    Args:
        task: the task that draws the examples.
        tokenizer: the tokenizer of the pair.
        batch: number of rows in a batch.
        seed: seed of the stream.
        longest: most tokens of prompt and answer together; longer examples are left out. None: no limit.
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
        """The next examples that are short enough, as many as a shard needs.

        Raises:
            DataError: nearly all examples are too long.
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
    """One of the example's right answers; empty if none is known, because a model then writes its own."""
    return example.references.sample(rng) if example.references else ""
