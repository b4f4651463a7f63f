"""Scores completions with the task's metrics."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from measuring.examples import Example
from training.gating.rollout import Rollout
from training.tasks import Task
from training.tokenizer import decode_answers


class SetScore(NamedTuple):
    """Scores of a whole set of completions, in [0, 1]."""

    quality: float
    similarity: float
    """Mean edit similarity."""


class Scored(NamedTuple):
    """The answer of one completion, with its scores in [0, 1]."""

    answer: str
    quality: float
    similarity: float


class _Key(NamedTuple):
    """A completion of an example, as a key."""

    number: int
    """Number of the example."""
    tokens: tuple[int, ...]


class Scorer:
    """Scores completions of `examples`, each different completion once: in a tree, many are the same."""

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> None:
        self._task = task
        self._tokenizer = tokenizer
        self._examples = examples
        self._known: dict[_Key, Scored] = {}

    def __call__(self, completions: Sequence[Rollout]) -> SetScore:
        """Scores of a set with one completion of each example."""
        scored = self._scored(completions)
        answers, qualities, similarities = map(list, zip(*scored, strict=True))
        quality = self._task.quality(self._examples, answers, qualities)
        return SetScore(quality, sum(similarities) / len(scored))

    def qualities(self, completions: Sequence[Rollout]) -> Tensor:
        """(examples,) quality of one completion of each example."""
        return torch.tensor([scored.quality for scored in self._scored(completions)])

    def worth(self, numbers: Sequence[int], completions: Sequence[list[int]]) -> Tensor:
        """(N,) mean of quality and similarity, in points of 100.

        Args:
            numbers: the numbers of N examples.
            completions: a completion of each of these examples, as token ids.
        """
        scored = self._look_up(map(_Key, numbers, map(tuple, completions)))
        return torch.tensor([50 * (found.quality + found.similarity) for found in scored])

    def _scored(self, completions: Sequence[Rollout]) -> list[Scored]:
        """The scores of one completion of each example."""
        keys = []
        for number, completion in enumerate(completions):
            keys.append(_Key(number, tuple(completion.tokens)))
        return self._look_up(keys)

    def _look_up(self, completions: Iterable[_Key]) -> list[Scored]:
        keys = list(completions)
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        if new:
            self._score(new)
        return [self._known[key] for key in keys]

    def _score(self, new: list[_Key]) -> None:
        examples = []
        completions = []
        for key in new:
            examples.append(self._examples[key.number])
            completions.append(list(key.tokens))
        answers = decode_answers(self._tokenizer, completions)
        scores = self._task.score(examples, answers)
        self._known.update(zip(new, map(Scored, answers, scores.quality, scores.similarity), strict=True))
