"""Demonstrations as padded batches, addressed by step: what makes a resumed run repeat itself exactly."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from measuring.json_lines import DataError
from training.tasks import Example, Task
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

    @property
    def targets(self) -> Tensor:
        """(N,) the answers' tokens, in the order of `answer`'s True cells."""
        return self.ids.roll(-1, dims=1)[self.answer]

    @property
    def positions(self) -> int:
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

    def prefixed(self, prefixes: list[list[int]], pad: int) -> "Batch":
        """Rows with these ids in front; their answer positions keep their order."""
        prompts, counts = self.prompts(), self.answer.sum(1).tolist()
        rows = zip(self.ids.tolist(), prompts, counts, strict=True)
        answers = [row[len(prompt) : len(prompt) + count] for row, prompt, count in rows]
        longer = [before + prompt for before, prompt in zip(prefixes, prompts, strict=True)]
        return Batch.of(longer, answers, pad).to(self.ids.device)

    def to(self, device: torch.device) -> "Batch":
        """On this device."""
        return replace(self, ids=self.ids.to(device), answer=self.answer.to(device))

    def parts(self, count: int) -> list["Batch"]:
        """`count` batches of equally many rows. Raises ValueError where that does not come out even."""
        if len(self.ids) % count:
            raise ValueError(f"a batch of {len(self.ids)} does not split into {count} equal parts")
        pairs = zip(self.ids.chunk(count), self.answer.chunk(count), strict=True)
        return [replace(self, ids=ids, answer=answer) for ids, answer in pairs]

    @classmethod
    def of(cls, prompts: list[list[int]], answers: list[list[int]], pad: int) -> Self:
        """Rows of prompt and answer, filled up with `pad`."""
        rows = [p + a for p, a in zip(prompts, answers, strict=True)]
        width = rounded_up(max(map(len, rows)))
        ids = torch.full((len(rows), width), pad)
        answer = torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            answer[i, len(prompts[i]) - 1 : len(row) - 1] = True
        return cls(ids, answer)


class Narrow(NamedTuple):
    """A batch in narrower parts, see `Batch.narrow`."""

    parts: list[Batch]
    order: Tensor | slice
    """(N,) brings the parts' answer positions, one part after the other, into the batch's order."""


def rounded_up(width: int) -> int:
    """Few distinct widths are friendlier to caches and compilers."""
    return -(-width // 8) * 8


def left_padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """ids (B, T) and mask (B, T), int64; 0 in the mask is padding."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


class Demonstrations:
    """Batch number `step` of a seeded stream of references; rows of similar length share a batch.

    longest: tokens of prompt and answer together; what is longer is left out. Raises ValueError where that
    is nearly everything.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        batch: int,
        seed: int,
        longest: int | None = None,
    ) -> None:
        self._task, self._tokenizer, self._batch, self._seed = task, tokenizer, batch, seed
        self._longest = longest
        self._shard: tuple[int, list[Batch]] = (-1, [])

    def __getitem__(self, step: int) -> Batch:
        shard, at = divmod(step, SHARD_BATCHES)
        if self._shard[0] != shard:
            self._shard = (shard, self._load(shard))
        return self._shard[1][at]

    def _load(self, shard: int) -> list[Batch]:
        seed = self._seed * 1_000_003 + shard
        rng = random.Random(seed)
        rows = sorted(self._rows(self._task.train(seed), rng), key=lambda row: len(row[0]) + len(row[1]))
        batches = []
        for first in range(0, len(rows), self._batch):
            prompts, answers = zip(*rows[first : first + self._batch], strict=True)
            batch = Batch.of(list(prompts), list(answers), self._tokenizer.eos_token_id)
            batches.append(replace(batch, comes_again=self._task.is_finite))
        rng.shuffle(batches)
        return batches

    def _rows(self, stream: Iterator[Example], rng: random.Random) -> list[tuple[list[int], list[int]]]:
        """Prompt and answer of the next examples that are short enough, as many as a shard takes."""
        wanted, rows = self._batch * SHARD_BATCHES, []
        for _ in range(DRAWS):
            examples = list(islice(stream, wanted))
            prompts = encode_prompts(self._tokenizer, [example.source for example in examples])
            answers = encode_answers(self._tokenizer, [e.references.sample(rng) for e in examples])
            pairs = zip(prompts, answers, strict=True)
            rows += [(p, a) for p, a in pairs if self._longest is None or len(p) + len(a) <= self._longest]
            if len(rows) >= wanted:
                return rows[:wanted]
        raise DataError(f"hardly an example has at most {self._longest} tokens, the context of the model")
