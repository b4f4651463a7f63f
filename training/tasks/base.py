"""What a task is: examples with all their right answers, split for good, and a metric.

`References` is a small grammar rather than a list: free variation multiplies (three synonyms here, two word
orders there), and a sentence easily has thousands of right answers.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

Slot = tuple[str, ...]
Form = tuple[Slot, ...]

_EDIT = 1 << 14  # weight of one edit in `similarity`; larger than any answer is long


@dataclass(frozen=True)
class References:
    """All right answers to one source: one form, and in it one alternative per slot, joined without
    separators.
    """

    forms: tuple[Form, ...]

    @classmethod
    def one(cls, text: str) -> References:
        return cls((((text,),),))

    @classmethod
    def from_json(cls, forms: list[list[list[str]]]) -> References:
        return cls(tuple(tuple(tuple(slot) for slot in form) for form in forms))

    def to_json(self) -> list[list[list[str]]]:
        """`[form][slot][alternative]`, the format of `examples.jsonl`."""
        return [[list(slot) for slot in form] for form in self.forms]

    def __len__(self) -> int:
        return sum(prod(len(slot) for slot in form) for form in self.forms)

    def first(self) -> str:
        return "".join(slot[0] for slot in self.forms[0])

    def sample(self, rng: random.Random) -> str:
        """One right answer; form and alternatives uniform."""
        return "".join(rng.choice(slot) for slot in rng.choice(self.forms))

    def accepts(self, text: str) -> bool:
        for form in self.forms:
            ends = {0}
            for slot in form:
                ends = {at + len(choice) for at in ends for choice in slot if text.startswith(choice, at)}
            if len(text) in ends:
                return True
        return False

    def similarity(self, text: str) -> float:
        """1 - d / max(len(text), len(nearest)), d the Levenshtein distance to the nearest right answer; in
        [0, 1].

        One dynamic programme over the grammar: a slot's rows are the minimum over its alternatives' rows.
        Cells hold `_EDIT` x edits - characters of the answer, so that the nearest answer's length is read off
        the result.
        """
        if self.accepts(text):
            return 1.0
        chars = np.array([ord(c) for c in text], dtype=np.int64)
        insertions = np.arange(len(text) + 1, dtype=np.int64) * _EDIT
        best = min(self._distance(form, chars, insertions) for form in self.forms)
        edits = -(-best // _EDIT)
        longest = max(len(text), edits * _EDIT - best)
        return 1.0 - edits / longest if longest else 1.0

    @staticmethod
    def _distance(form: Form, chars: np.ndarray, insertions: np.ndarray) -> int:
        row = insertions.copy()
        for slot in form:
            ends = []
            for choice in slot:
                at = row
                for char in choice:
                    new = at + (_EDIT - 1)
                    np.minimum(new[1:], at[:-1] + (chars != ord(char)) * _EDIT - 1, out=new[1:])
                    at = np.minimum.accumulate(new - insertions) + insertions
                ends.append(at)
            row = np.minimum.reduce(ends)
        return int(row[-1])


@dataclass(frozen=True)
class Example:
    source: str
    references: References


@dataclass(frozen=True)
class Scores:
    """Per-example metrics, each in [0, 1]; `quality` is what curves and gaps are computed on."""

    quality: list[float]
    similarity: list[float]


ROUTER_SEED = 7_000_000


class Task(ABC):
    """Three disjoint splits and a metric. `train` may be endless; `valid` and `test` are the same on every
    machine.
    """

    name: str
    options: Mapping[str, Any] = MappingProxyType({})
    """What `make_task` made it with."""

    @abstractmethod
    def train(self, seed: int) -> Iterator[Example]:
        """Examples for training; another seed, other examples (or another order of finite data)."""

    def router(self, seed: int) -> Iterator[Example]:
        """Examples for the router's rollouts; where possible the pair was trained on none of them."""
        return self.train(ROUTER_SEED + seed)

    @abstractmethod
    def valid(self) -> list[Example]: ...

    @abstractmethod
    def test(self) -> list[Example]: ...

    def score(self, examples: list[Example], answers: list[str]) -> Scores:
        """Exact match against all right answers, and edit similarity to the nearest."""
        pairs = list(zip(examples, answers, strict=True))
        return Scores(
            quality=[float(example.references.accepts(answer)) for example, answer in pairs],
            similarity=[example.references.similarity(answer) for example, answer in pairs],
        )

    def quality(self, examples: list[Example], answers: list[str], each: list[float]) -> float:
        """Of a whole set, in [0, 1]: the mean of `each` (what `score` gave), or the corpus's own metric."""
        return sum(each) / len(each)


TASKS: dict[str, Callable[..., Task]] = {}
TaskClass = TypeVar("TaskClass", bound=type[Task])


def register(cls: TaskClass) -> TaskClass:
    TASKS[cls.name] = cls
    return cls


def make_task(name: str, **options: Any) -> Task:
    """Raises KeyError that lists the known names, TypeError for options that the task does not have."""
    if name not in TASKS:
        raise KeyError(f"unknown task {name!r}; known: {', '.join(sorted(TASKS))}")
    task = TASKS[name](**options)
    task.options = options
    return task
