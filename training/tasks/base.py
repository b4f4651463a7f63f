"""A task: examples with all their right answers, fixed splits, and a metric."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from measuring.examples import Example


@dataclass(frozen=True)
class Scores:
    """Per-example metrics, each in [0, 1]; `quality` is what curves and gaps are computed on."""

    quality: list[float]
    similarity: list[float]


ROUTER_SEED = 7_000_000


class Task(ABC):
    """Three disjoint splits and a metric.

    `train` may be endless; `valid` and `test` are the same on every machine.
    """

    name: str
    is_finite: bool = False
    """Whether training examples come again, epoch by epoch."""
    has_references: bool = True
    """Whether every example has a right answer."""
    options: Mapping[str, Any] = MappingProxyType({})
    """What `make_task` made it with."""

    @abstractmethod
    def train(self, seed: int) -> Iterator[Example]:
        """Examples for training; another seed, other examples (or another order of finite data)."""

    def router(self, seed: int) -> Iterator[Example]:
        """Examples for the router's rollouts; where possible the pair was trained on none of them."""
        return self.train(ROUTER_SEED + seed)

    @abstractmethod
    def valid(self) -> list[Example]:
        """Examples for validation and calibration."""

    @abstractmethod
    def test(self) -> list[Example]:
        """Examples for evaluation."""

    def score(self, examples: list[Example], answers: list[str]) -> Scores:
        """Exact match against all right answers, and edit similarity to the nearest."""
        scores = Scores([], [])
        for example, answer in zip(examples, answers, strict=True):
            scores.quality.append(float(example.references.accepts(answer)))
            scores.similarity.append(example.references.similarity(answer))
        return scores

    def quality(self, examples: list[Example], answers: list[str], qualities: list[float]) -> float:
        """Quality of a whole set, in [0, 1].

        Args:
            examples: the set.
            answers: to its examples.
            qualities: what `score` gave; their mean is the result unless the metric is defined on sets.
        """
        return sum(qualities) / len(qualities)


TASKS: dict[str, Callable[..., Task]] = {}
TaskClass = TypeVar("TaskClass", bound=type[Task])


def register(cls: TaskClass) -> TaskClass:
    """Make a task known by its name to `make_task`."""
    TASKS[cls.name] = cls
    return cls


def make_task(name: str, **options: Any) -> Task:
    """Raises KeyError that lists the known names, TypeError for options that the task does not have."""
    if name not in TASKS:
        raise KeyError(f"unknown task {name!r}; known: {', '.join(sorted(TASKS))}")
    task = TASKS[name](**options)
    task.options = options
    return task
