"""What completions are worth by the task's metrics."""

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
    """Of a whole set of completions, in [0, 1]."""

    quality: float
    similarity: float
    """Mean edit similarity."""


class Scored(NamedTuple):
    """One completion, scored."""

    answer: str
    quality: float
    similarity: float


class Scorer:
    """Scores completions of `examples`; remembers answers, of which a tree gives few different ones."""

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> None:
        self._task, self._tokenizer, self._examples = task, tokenizer, examples
        self._known: dict[tuple[int, tuple[int, ...]], Scored] = {}

    def __call__(self, completions: Sequence[Rollout]) -> SetScore:
        """Of one completion of each example."""
        scored = self._look_up(enumerate(c.tokens for c in completions))
        answers = [each.answer for each in scored]
        qualities = [each.quality for each in scored]
        quality = self._task.quality(self._examples, answers, qualities)
        return SetScore(quality, sum(each.similarity for each in scored) / len(scored))

    def each(self, completions: Sequence[Rollout]) -> Tensor:
        """Quality of every completion: (examples,)"""
        scored = self._look_up(enumerate(c.tokens for c in completions))
        return torch.tensor([each.quality for each in scored])

    def worth(self, numbers: Sequence[int], completions: Sequence[list[int]]) -> Tensor:
        """Mean of quality and similarity, in points of 100: (N,).

        Args:
            numbers: of N examples.
            completions: token ids, one for each number.
        """
        scored = self._look_up(zip(numbers, completions, strict=True))
        return torch.tensor([50 * (each.quality + each.similarity) for each in scored])

    def _look_up(self, completions: Iterable[tuple[int, list[int]]]) -> list[Scored]:
        """Every completion of an example, by its number."""
        keys = [(number, tuple(tokens)) for number, tokens in completions]
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        if new:
            answers = decode_answers(self._tokenizer, [list(tokens) for _, tokens in new])
            scores = self._task.score([self._examples[number] for number, _ in new], answers)
            columns = zip(new, answers, scores.quality, scores.similarity, strict=True)
            for key, answer, quality, similarity in columns:
                self._known[key] = Scored(answer, quality, similarity)
        return [self._known[key] for key in keys]
