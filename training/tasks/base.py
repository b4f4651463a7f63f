"""The base class of tasks: examples with all their right answers, fixed splits, and a metric."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from measuring.examples import Example


@dataclass(frozen=True)
class Scores:
    """Metrics of each example, in [0, 1]; curves and gaps are computed from `quality`."""

    quality: list[float]
    similarity: list[float]


ROUTER_SEED = 7_000_000


class Task(ABC):
    """Three disjoint splits and a metric.

    `train` may be endless; `valid` and `test` are the same on every machine.
    """

    name: str
    is_finite: bool = False
    """Whether training examples repeat, epoch by epoch."""
    has_references: bool = True
    """Whether every example has a right answer."""
    options: Mapping[str, Any] = MappingProxyType({})
    """The options that `make_task` made the task with."""

    @abstractmethod
    def train(self, seed: int) -> Iterator[Example]:
        """Examples for training; another seed gives other examples, or another order of finite data."""

    def router(self, seed: int) -> Iterator[Example]:
        """Examples for the router's rollouts; if possible, the pair was trained on none of them."""
        return self.train(ROUTER_SEED + seed)

    @abstractmethod
    def valid(self) -> list[Example]:
        """Examples for validation and calibration."""

    @abstractmethod
    def test(self) -> list[Example]:
        """Examples for evaluation."""

    def score(self, examples: list[Example], answers: list[str]) -> Scores:
        """Exact match with any right answer as quality, and edit similarity to the nearest right answer."""
        scores = Scores([], [])
        for example, answer in zip(examples, answers, strict=True):
            scores.quality.append(float(example.references.accepts(answer)))
            scores.similarity.append(example.references.similarity(answer))
        return scores

    def quality(self, examples: list[Example], answers: list[str], qualities: list[float]) -> float:
        """Quality of a whole set, in [0, 1]: the mean, unless the metric is defined on whole sets.

        Args:
            examples: the examples of the set.
            answers: the answer to each example.
            qualities: the quality of each answer, from `score`.
        """
        return sum(qualities) / len(qualities)


TASKS: dict[str, Callable[..., Task]] = {}
TaskClass = TypeVar("TaskClass", bound=type[Task])


def register(cls: TaskClass) -> TaskClass:
    """Register a task under its name for `make_task`."""
    TASKS[cls.name] = cls
    return cls


def make_task(name: str, **options: Any) -> Task:
    """Make the task of this name.

    Raises:
        KeyError: there is no such task; the message lists the known names.
        TypeError: the task does not have an option.
    """
    if name not in TASKS:
        raise KeyError(f"unknown task {name!r}; known: {', '.join(sorted(TASKS))}")
    task = TASKS[name](**options)
    task.options = options
    return task
