"""Inputs of a `wheels bench` run, shared by its sections."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from measuring.examples import Example, load_examples
from measuring.pair import Pair
from server.bench.heavy import deepen
from server.bench.load import BenchRequest

T = TypeVar("T")


class Deepened(NamedTuple):
    """A pair whose teacher was made heavy."""

    pair: Pair
    parameters: int
    """Number of its teacher's parameters."""


@dataclass(frozen=True)
class Plan:
    """The pair to measure, how much to measure, and what the sections share."""

    pair: Pair
    examples_file: Path
    rounds: int
    quick: bool
    """Whether to measure less of everything, which shows that it works, but is not for reports."""
    work: Path
    """Directory for logs and the heavy teacher; deleted afterwards."""
    shared: ExitStack
    """Stack that ends the servers which several sections share."""
    litellm: Path | None = None
    """Python interpreter with LiteLLM's proxy; None if there is none."""
    _made: dict[Any, Any] = field(default_factory=dict)
    """Results of `once`, by the function that made them."""

    @cached_property
    def examples(self) -> Sequence[Example]:
        """Examples of the pair.

        Raises:
            DataError: the pair has none.
        """
        return load_examples(self.examples_file)

    @cached_property
    def _deepened(self) -> Deepened:
        target = self.work / "heavy"
        count = deepen(self.pair.teacher, target)
        return Deepened(Pair(target, self.pair.student, self.pair.router), count)

    @property
    def heavy(self) -> Pair:
        """The pair with a teacher that costs a hundred times as much and writes the same."""
        return self._deepened.pair

    @property
    def heavy_size(self) -> str:
        """Number of the heavy teacher's parameters, as text."""
        return f"{self._deepened.parameters / 1e6:.0f} M parameters"

    def once(self, make: "Callable[[Plan], T]") -> T:
        """The result of ``make`` for this plan; ``make`` is called only once."""
        if make not in self._made:
            self._made[make] = make(self)
        made: T = self._made[make]
        return made

    def some(self, count: int, turn: int) -> list[Example]:
        """``count`` examples; every round has other ones until all are used."""
        start = turn * count % len(self.examples)
        return [*self.examples, *self.examples][start : start + count]

    def chats(self, count: int, turn: int, **fields: Any) -> list[BenchRequest]:
        """The sources of `some`, each as a chat with these further fields."""
        requests: list[BenchRequest] = []
        for example in self.some(count, turn):
            requests.append(BenchRequest.chat(example.source, **fields))
        return requests


def synthetic(count: int, prompt: int, length: int, turn: int = 0) -> list[BenchRequest]:
    """Prompts of token ids that differ from their first token on, and between rounds.

    Args:
        count: number of prompts.
        prompt: tokens of each prompt.
        length: tokens by which each prompt is continued.
        turn: number of the round.
    """
    requests: list[BenchRequest] = []
    for index in range(count):
        seed = index + turn * count
        step = (1 + seed % 13) * 31
        tokens = [5 + (seed * 7919 + position * step) % 400 for position in range(prompt)]
        requests.append(BenchRequest.tokens(tokens, length))
    return requests
