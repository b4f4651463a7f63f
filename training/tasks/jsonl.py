"""`jsonl`: any data of one's own, as files of lines `{"source": ..., "target": ...}`."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

from measuring.examples import Example, References, sources_of
from measuring.json_lines import DataError, read_some_json_lines
from training.tasks.base import Scores, Task, register

Metric = Callable[[str, str], float]
"""Target and answer -> in [0, 1]."""


def _exact() -> Metric:
    return lambda target, answer: float(target == answer)


def _bleu() -> Metric:
    from sacrebleu import sentence_bleu

    return lambda target, answer: sentence_bleu(answer, [target]).score / 100


def _chrf() -> Metric:
    from sacrebleu import sentence_chrf

    return lambda target, answer: sentence_chrf(answer, [target]).score / 100


def _rouge_l() -> Metric:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return lambda target, answer: scorer.score(target, answer)["rougeL"].fmeasure


METRICS: dict[str, Callable[[], Metric]] = {
    "exact": _exact,
    "bleu": _bleu,
    "chrf": _chrf,
    "rouge_l": _rouge_l,
}
"""Their packages are imported when a task needs them."""


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
    """Files of a directory.

    Args:
        directory: of the files.
        train: name of the file to train on; what is in the other two is left out of it.
        valid: name of the file to validate and calibrate on.
        test: name of the file to evaluate on.
        metric: a name in `METRICS`.
        router: training examples kept for the router's rollouts. A teacher knows by heart what it was trained
            on, and would look better there than it is.

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
        self._metric = METRICS[metric]
        self._corpus = CORPUS.get(metric)
        place = Path(directory)
        examples = self._read(place / train)
        self._valid = self._read(place / valid)
        self._test = self._read(place / test)
        held_out = set(sources_of(self._valid + self._test))
        examples = [example for example in examples if example.source not in held_out]
        if not examples:
            raise DataError(f"{place / train}: every source is in {valid} or {test} as well")
        if not 0 <= router < len(examples):
            raise ValueError(f"cannot keep {router} of {len(examples)} training examples for the router")
        random.Random(0).shuffle(examples)
        self._router = examples[:router]
        self._train = examples[router:]

    @staticmethod
    def _read(path: Path) -> list[Example]:
        examples = []
        for row in read_some_json_lines(path):
            examples.append(Example(row.text("source"), References.one(row.text("target"))))
        return examples

    def train(self, seed: int) -> Iterator[Example]:
        """The training file again and again, shuffled."""
        return self._shuffled(self._train, seed)

    def router(self, seed: int) -> Iterator[Example]:
        """What is kept for the router, or the training file if nothing is."""
        return self._shuffled(self._router or self._train, seed)

    @staticmethod
    def _shuffled(examples: list[Example], seed: int) -> Iterator[Example]:
        """Without end, in another order every time."""
        rng = random.Random(seed)
        while True:
            yield from rng.sample(examples, len(examples))

    def valid(self) -> list[Example]:
        """The validation file."""
        return self._valid

    def test(self) -> list[Example]:
        """The test file."""
        return self._test

    def score(self, examples: list[Example], answers: list[str]) -> Scores:
        """By the metric that the recipe names, and edit similarity to the target."""
        metric = self._metric()
        scores = Scores([], [])
        for example, answer in zip(examples, answers, strict=True):
            scores.quality.append(metric(example.references.first(), answer))
            scores.similarity.append(example.references.similarity(answer))
        return scores

    def quality(self, examples: list[Example], answers: list[str], qualities: list[float]) -> float:
        """By the metric's own definition on a whole set, if it has one."""
        if self._corpus is None:
            return super().quality(examples, answers, qualities)
        return self._corpus([example.references.first() for example in examples], answers)
