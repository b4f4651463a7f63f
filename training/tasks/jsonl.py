"""`jsonl`: any data of one's own, as files of lines `{"source": ..., "target": ...}`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from training.tasks.base import Example, References, Scores, Task, register


def _exact(targets: list[str], answers: list[str]) -> list[float]:
    return [float(target == answer) for target, answer in zip(targets, answers, strict=True)]


def _bleu(targets: list[str], answers: list[str]) -> list[float]:
    from sacrebleu import sentence_bleu

    return [sentence_bleu(a, [t]).score / 100 for t, a in zip(targets, answers, strict=True)]


def _chrf(targets: list[str], answers: list[str]) -> list[float]:
    from sacrebleu import sentence_chrf

    return [sentence_chrf(a, [t]).score / 100 for t, a in zip(targets, answers, strict=True)]


def _rouge_l(targets: list[str], answers: list[str]) -> list[float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [scorer.score(t, a)["rougeL"].fmeasure for t, a in zip(targets, answers, strict=True)]


METRICS: dict[str, Callable[[list[str], list[str]], list[float]]] = {
    "exact": _exact, "bleu": _bleu, "chrf": _chrf, "rouge_l": _rouge_l,
}  # fmt: skip


@register
class Jsonl(Task):
    """Raises ValueError, naming file and line, for a line without `source` and `target`."""

    name = "jsonl"

    def __init__(self, train: str, valid: str, test: str, metric: str = "exact") -> None:
        if metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")
        self._metric = METRICS[metric]
        self._train, self._valid, self._test = (self._read(Path(path)) for path in (train, valid, test))
        held_out = {example.source for example in self._valid + self._test}
        self._train = [example for example in self._train if example.source not in held_out]

    @staticmethod
    def _read(path: Path) -> list[Example]:
        examples = []
        for number, line in enumerate(path.read_text().splitlines(), 1):
            row = json.loads(line)
            if not isinstance(row, dict) or not {"source", "target"} <= row.keys():
                raise ValueError(f"{path}:{number}: want an object with source and target")
            examples.append(Example(row["source"], References.one(row["target"])))
        return examples

    def train(self, seed: int) -> Iterator[Example]:
        rng = random.Random(seed)
        while True:
            yield from rng.sample(self._train, len(self._train))

    def valid(self) -> list[Example]:
        return self._valid

    def test(self) -> list[Example]:
        return self._test

    def score(self, examples: list[Example], answers: list[str]) -> Scores:
        targets = [example.references.first() for example in examples]
        return Scores(
            quality=self._metric(targets, answers),
            similarity=[
                example.references.similarity(a) for example, a in zip(examples, answers, strict=True)
            ],
        )
