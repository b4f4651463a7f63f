"""Quality against realised teacher rate, in process."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from measuring.examples import Example
from measuring.scores import excess
from training.gating.calibration import teacher_rate
from training.gating.rollout import Completion
from training.gating.tree import Setting
from training.tasks import Task
from training.tokenizer import decode_answers


@dataclass(frozen=True)
class Point:
    """One setting over a set of examples.

    budget: fraction asked for; rate: realised; quality, similarity: in [0, 1]; calls, runs: per request, a
    run is of calls that follow each other without a token between; positions: that the teacher processes per
    request, catching up included, its cache kept between calls; tokens: mean completion length; excess:
    tokens by which the worst prefix of a completion lies above its bound fraction * length + span (never
    above 0).
    """

    budget: float
    price: float
    rate: float
    quality: float
    similarity: float
    calls: float
    runs: float
    positions: float
    tokens: float
    excess: float


class Scorer:
    """Scores completions of `examples`; remembers answers, of which a tree gives few different ones."""

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> None:
        self._task, self._tokenizer, self._examples = task, tokenizer, examples
        self._known: dict[tuple[int, tuple[int, ...]], tuple[str, float, float]] = {}

    def __call__(self, completions: Sequence[Completion]) -> tuple[float, float]:
        """Quality and mean similarity."""
        known = self._look_up(enumerate(c.tokens for c in completions))
        answers, qualities, similarities = map(list, zip(*known, strict=True))
        quality = self._task.quality(self._examples, answers, qualities)
        return quality, sum(similarities) / len(similarities)

    def each(self, completions: Sequence[Completion]) -> Tensor:
        """Quality of every completion: (examples,)"""
        known = self._look_up(enumerate(c.tokens for c in completions))
        return torch.tensor([quality for _, quality, _ in known])

    def worth(self, of: Sequence[int], completions: Sequence[list[int]]) -> Tensor:
        """Mean of quality and similarity, in points of 100: (N,). of: numbers of N examples; completions: of
        theirs, token ids.
        """
        known = self._look_up(zip(of, completions, strict=True))
        return torch.tensor([50 * (quality + similarity) for _, quality, similarity in known])

    def _look_up(self, completions: Iterable[tuple[int, list[int]]]) -> list[tuple[str, float, float]]:
        """Answer, quality and similarity of every completion of an example, by its number."""
        keys = [(i, tuple(tokens)) for i, tokens in completions]
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        if new:
            answers = decode_answers(self._tokenizer, [list(tokens) for _, tokens in new])
            scores = self._task.score([self._examples[i] for i, _ in new], answers)
            triples = zip(answers, scores.quality, scores.similarity, strict=True)
            self._known.update(zip(new, triples, strict=True))
        return [self._known[key] for key in keys]


def ends(gate: str) -> list[Setting]:
    """Student alone and teacher alone."""
    return [Setting(gate, math.inf, 0.0, 1), Setting(gate, -math.inf, 1.0, 1)]


def point(
    completions: Sequence[Completion],
    prompt_tokens: Sequence[int],
    setting: Setting,
    quality: float,
    similarity: float,
) -> Point:
    count, span = len(completions), setting.span_tokens if 0 < setting.fraction < 1 else 0
    return Point(
        budget=setting.fraction,
        price=setting.price,
        rate=teacher_rate(completions),
        quality=quality,
        similarity=similarity,
        calls=sum(len(c.starts) for c in completions) / count,
        runs=sum(runs(c) for c in completions) / count,
        positions=sum(map(teacher_positions, completions, prompt_tokens)) / count,
        tokens=sum(len(c.tokens) for c in completions) / count,
        excess=max(excess(c.by_teacher, setting.fraction) for c in completions) - span,
    )


def runs(completion: Completion) -> int:
    """Stretches of teacher tokens."""
    return sum(now and not before for before, now in pairwise([False, *completion.by_teacher]))


def teacher_positions(completion: Completion, prompt_tokens: int) -> int:
    """Prompt and all that was written up to the last teacher token; 0 for one that never asked."""
    last = max((at for at, flag in enumerate(completion.by_teacher) if flag), default=None)
    return 0 if last is None else prompt_tokens + last
