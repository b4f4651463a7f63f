"""A task over three sets of examples, whatever they were read from."""

import random
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from measuring.chats import Source, Turn, turns
from measuring.examples import Example, References, sources_of
from measuring.json_lines import DataError
from training.tasks.base import Scores, Task
from training.tasks.judging import ServedJudge
from training.tasks.metrics import CORPUS, judge_of, metric_maker


class Splits(NamedTuple):
    """Three sets of examples."""

    train: list[Example]
    """To train on; what is in the other two is left out of it."""
    valid: list[Example]
    """To validate and calibrate on."""
    test: list[Example]
    """To evaluate on."""


class FiniteTask(Task):
    """Examples that come again, epoch by epoch.

    Args:
        splits: all of them.
        metric: a name in `training.tasks.metrics.METRICS`, or `module:function` of target and answer.
        judge: `module:function` of messages and answer, or the fields of a
            `training.tasks.judging.ServedJudge`; in place of a metric, and for examples without a target.
        router: training examples kept for the router's rollouts. A teacher knows by heart what it was trained
            on, and would look better there than it is.

    Raises:
        DataError: the examples cannot be used.
        ValueError: an unknown metric or judge, or too many examples kept for the router.
    """

    is_finite = True

    def __init__(
        self,
        splits: Splits,
        metric: str,
        judge: str | Mapping[str, Any] | None,
        router: int,
    ) -> None:
        self._metric = metric_maker(metric)
        self._corpus = CORPUS.get(metric) if judge is None else None
        self._judge = judge_of(judge) if isinstance(judge, str) else None
        self._served = ServedJudge(**judge) if isinstance(judge, Mapping) else None
        self._valid = splits.valid
        self._test = splits.test
        held_out = set(sources_of(splits.valid + splits.test))
        examples = [example for example in splits.train if example.source not in held_out]
        if not examples:
            raise DataError("every training source is in the validation or test set as well")
        if not 0 <= router < len(examples):
            raise ValueError(f"cannot keep {router} of {len(examples)} training examples for the router")
        self.has_references = all(example.references for example in examples + splits.valid + splits.test)
        if not self.has_references and judge is None:
            raise DataError("some examples have no answer: only a judge can score them (option judge)")
        random.Random(0).shuffle(examples)
        self._router = examples[:router]
        self._train = examples[router:]

    def train(self, seed: int) -> Iterator[Example]:
        """The training examples again and again, shuffled."""
        return self._shuffled(self._train, seed)

    def router(self, seed: int) -> Iterator[Example]:
        """What is kept for the router, or the training examples if nothing is."""
        return self._shuffled(self._router or self._train, seed)

    @staticmethod
    def _shuffled(examples: list[Example], seed: int) -> Iterator[Example]:
        """Without end, in another order every time."""
        rng = random.Random(seed)
        while True:
            yield from rng.sample(examples, len(examples))

    def valid(self) -> list[Example]:
        """The validation set."""
        return self._valid

    def test(self) -> list[Example]:
        """The test set."""
        return self._test

    def score(self, examples: list[Example], answers: list[str]) -> Scores:
        """By the judge or metric that the recipe names, and edit similarity to the target."""
        qualities = self._qualities(examples, answers)
        scores = Scores(qualities, [])
        for example, answer, quality in zip(examples, answers, qualities, strict=True):
            known = bool(example.references)
            scores.similarity.append(example.references.similarity(answer) if known else quality)
        return scores

    def _qualities(self, examples: list[Example], answers: list[str]) -> list[float]:
        if self._served is not None:
            return self._served.rate(sources_of(examples), answers)
        if self._judge is not None:
            return list(map(self._judge, sources_of(examples), answers))
        metric = self._metric()
        qualities = []
        for example, answer in zip(examples, answers, strict=True):
            qualities.append(metric(example.references.first(), answer))
        return qualities

    def quality(self, examples: list[Example], answers: list[str], qualities: list[float]) -> float:
        """By the metric's own definition on a whole set, if it has one."""
        if self._corpus is None:
            return super().quality(examples, answers, qualities)
        return self._corpus([example.references.first() for example in examples], answers)


def conversation(messages: Any, target: str | None = None) -> Example:
    """An example from messages. If the last turn is the assistant's, it is the target.

    Raises:
        DataError: they are no conversation, or ask nothing.
    """
    asked: tuple[Turn, ...] = turns(messages)
    if target is None and asked[-1].role == "assistant":
        target = asked[-1].content
        asked = asked[:-1]
    if not asked or asked[-1].role == "assistant":
        raise DataError("'messages' have no question before the answer")
    return example(asked, target)


def example(source: Source, target: str | None) -> Example:
    """An example with one right answer, or with none."""
    return Example(source) if target is None else Example(source, References.one(target))
