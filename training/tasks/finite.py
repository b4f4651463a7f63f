"""The base class of tasks over three finite sets of examples."""

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
    """Examples to train on; sources that are also in another split are left out."""
    valid: list[Example]
    """Examples to validate and calibrate on."""
    test: list[Example]
    """Examples to evaluate on."""


class FiniteTask(Task):
    """A task whose training examples repeat, epoch by epoch.

    Args:
        splits: the examples of all splits.
        metric: a name in `training.tasks.metrics.METRICS`, or `module:function` of target and answer.
        judge: `module:function` of messages and answer, or the fields of a
            `training.tasks.judging.ServedJudge`. It replaces the metric, and examples need no target.
        router: number of training examples to keep for the router's rollouts. A teacher looks better than it
            is on examples that it was trained on.

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
        """The training examples, repeated without end, in a new order every time."""
        return self._shuffled(self._train, seed)

    def router(self, seed: int) -> Iterator[Example]:
        """The examples kept for the router, or else the training examples, repeated without end."""
        return self._shuffled(self._router or self._train, seed)

    @staticmethod
    def _shuffled(examples: list[Example], seed: int) -> Iterator[Example]:
        """The examples, repeated without end, in a new order every time."""
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
        """Quality by the recipe's judge or metric, and edit similarity to the target.

        If an example has no target, its similarity is its quality.
        """
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
        """Quality of a whole set, by the metric's own definition on sets if it has one; else the mean."""
        if self._corpus is None:
            return super().quality(examples, answers, qualities)
        return self._corpus([example.references.first() for example in examples], answers)


def conversation(messages: Any, target: str | None = None) -> Example:
    """An example from a conversation.

    Args:
        messages: the turns of the conversation.
        target: the answer; None: the last turn, if it is the assistant's.

    Raises:
        DataError: the messages are not a conversation, or have no question before the answer.
    """
    asked: tuple[Turn, ...] = turns(messages)
    if target is None and asked[-1].role == "assistant":
        target = asked[-1].content
        asked = asked[:-1]
    if not asked or asked[-1].role == "assistant":
        raise DataError("'messages' have no question before the answer")
    return example(asked, target)


def example(source: Source, target: str | None) -> Example:
    """An example with one right answer, or with none if `target` is None."""
    return Example(source) if target is None else Example(source, References.one(target))
