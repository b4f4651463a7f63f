"""Quality against realised teacher rate, in process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from training.calibration import Quality, teacher_rate
from training.rollout import Completion
from training.tasks import Example, Task
from training.tokenizer import decode_answers
from training.tree import Setting, Tree


@dataclass(frozen=True)
class Point:
    """One setting over a set of examples.

    budget: fraction asked for; rate: realised; quality, similarity: means in [0, 1]; calls: per request;
    tokens: mean completion length; excess: tokens by which the worst request lies above its bound fraction *
    completion + span (never above 0).
    """

    budget: float
    price: float
    rate: float
    quality: float
    similarity: float
    calls: float
    tokens: float
    excess: float


def measure(
    tree: Tree,
    settings: Sequence[Setting],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
) -> list[Point]:
    """One point for each setting; `examples` are those of the tree's prompts."""
    return [
        point(completions, setting, task, tokenizer, examples)
        for setting, completions in zip(settings, tree.run(settings), strict=True)
    ]


def ends(gate: str) -> list[Setting]:
    """Student alone and teacher alone."""
    return [Setting(gate, math.inf, 0.0, 1), Setting(gate, -math.inf, 1.0, 1)]


def point(
    completions: list[Completion],
    setting: Setting,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
) -> Point:
    scores = task.score(examples, decode_answers(tokenizer, [c.tokens for c in completions]))
    count, span = len(completions), setting.span_tokens if 0 < setting.fraction < 1 else 0
    return Point(
        budget=setting.fraction,
        price=setting.price,
        rate=teacher_rate(completions),
        quality=sum(scores.quality) / count,
        similarity=sum(scores.similarity) / count,
        calls=sum(len(c.starts) for c in completions) / count,
        tokens=sum(len(c.tokens) for c in completions) / count,
        excess=max(c.teacher_tokens - setting.fraction * len(c.tokens) - span for c in completions),
    )


def mean_quality(task: Task, tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> Quality:
    """Quality of completions of these examples; remembers answers: a tree gives few different ones."""
    known: dict[tuple[int, tuple[int, ...]], float] = {}

    def quality(completions: Sequence[Completion]) -> float:
        keys = [(i, tuple(c.tokens)) for i, c in enumerate(completions)]
        new = [key for key in keys if key not in known]
        answers = decode_answers(tokenizer, [list(tokens) for _, tokens in new])
        scores = task.score([examples[i] for i, _ in new], answers).quality if new else []
        known.update(zip(new, scores, strict=True))
        return sum(known[key] for key in keys) / len(keys)

    return quality


def recovered(quality: float, student: float, teacher: float) -> float:
    """Performance gap recovered; nan where there is no gap."""
    return (quality - student) / (teacher - student) if teacher != student else math.nan
