"""`jsonl`: any data of one's own, as files of lines `{"source": ..., "target": ...}`."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

from measuring.examples import Example, References
from measuring.json_lines import DataError, read_some_json_lines
from training.tasks.base import Scores, Task, register


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
    "exact": _exact,
    "bleu": _bleu,
    "chrf": _chrf,
    "rouge_l": _rouge_l,
}


def _corpus_bleu(targets: list[str], answers: list[str]) -> float:
    from sacrebleu import corpus_bleu

    return corpus_bleu(answers, [targets]).score / 100


def _corpus_chrf(targets: list[str], answers: list[str]) -> float:
    from sacrebleu import corpus_chrf

    return corpus_chrf(answers, [targets]).score / 100


CORPUS: dict[str, Callable[[list[str], list[str]], float]] = {"bleu": _corpus_bleu, "chrf": _corpus_chrf}
"""Metrics that are defined on a whole set; the others are means over its examples."""


@register
class Jsonl(Task):
    """Files of a directory. `router`: training examples kept for the router's rollouts, as a teacher knows by
    heart what it was trained on, and would look better there than it is.

    Raises:
        DataError: a file or a line of it cannot be used; the message names them.
        ValueError: an unknown metric, or too many examples kept for the router.
    """

    name = "jsonl"
    is_finite = True

    def __init__(
        self,
        directory: str = ".",
        train: str = "train.jsonl",
        valid: str = "valid.jsonl",
        test: str = "test.jsonl",
        metric: str = "exact",
        router: int = 0,
    ) -> None:
        if metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")
        self._metric, self._corpus = METRICS[metric], CORPUS.get(metric)
        self._train, self._valid, self._test = (
            self._read(Path(directory) / path) for path in (train, valid, test)
        )
        held_out = {example.source for example in self._valid + self._test}
        self._train = [example for example in self._train if example.source not in held_out]
        if not self._train:
            raise DataError(f"{Path(directory) / train}: every source is in {valid} or {test} as well")
        if not 0 <= router < len(self._train):
            raise ValueError(f"cannot keep {router} of {len(self._train)} training examples for the router")
        random.Random(0).shuffle(self._train)
        self._router, self._train = self._train[:router], self._train[router:]

    @staticmethod
    def _read(path: Path) -> list[Example]:
        rows = read_some_json_lines(path)
        return [Example(row.text("source"), References.one(row.text("target"))) for row in rows]

    def train(self, seed: int) -> Iterator[Example]:
        return self._shuffled(self._train, seed)

    def router(self, seed: int) -> Iterator[Example]:
        return self._shuffled(self._router or self._train, seed)

    @staticmethod
    def _shuffled(examples: list[Example], seed: int) -> Iterator[Example]:
        """Without end, in another order every time."""
        rng = random.Random(seed)
        while True:
            yield from rng.sample(examples, len(examples))

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

    def quality(self, examples: list[Example], answers: list[str], each: list[float]) -> float:
        if self._corpus is None:
            return super().quality(examples, answers, each)
        return self._corpus([example.references.first() for example in examples], answers)
