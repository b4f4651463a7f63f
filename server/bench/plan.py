"""What a run of `wheels bench` measures with, shared by its sections."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from server.bench.heavy import deepen
from server.bench.load import Call
from server.local.measure import Example
from server.local.pair import Pair

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    pair: Pair
    examples: Sequence[Example]
    rounds: int
    quick: bool
    """Less of everything: to see that it works, not to report."""
    work: Path
    """For logs and the heavy teacher; thrown away afterwards."""
    open: ExitStack
    """Ends what several sections share."""
    litellm: Path | None = None
    """A Python that has LiteLLM's proxy."""
    _made: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def _deepened(self) -> tuple[Pair, int]:
        target = self.work / "heavy"
        count = deepen(self.pair.teacher, target)
        return Pair(target, self.pair.student, self.pair.router), count

    @property
    def heavy(self) -> Pair:
        """The pair with a teacher that costs a hundred times as much and writes the same."""
        return self._deepened[0]

    @property
    def heavy_size(self) -> str:
        """Parameters of its teacher, for people."""
        return f"{self._deepened[1] / 1e6:.0f} M parameters"

    def once(self, make: "Callable[[Plan], T]") -> T:
        """What several sections share: made for the first of them."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]

    def some(self, count: int, turn: int) -> list[Example]:
        """``count`` examples, others in every round as long as there are."""
        start = turn * count % len(self.examples)
        return [*self.examples, *self.examples][start : start + count]

    def chats(self, count: int, turn: int) -> list[Call]:
        return [Call.chat(example.source) for example in self.some(count, turn)]


def synthetic(count: int, prompt: int, length: int, turn: int = 0) -> list[Call]:
    """``count`` prompts of token ids that differ from their first token on, and between rounds."""

    def ids(index: int) -> list[int]:
        seed = index + turn * count
        return [5 + (seed * 7919 + i * (1 + seed % 13) * 31) % 400 for i in range(prompt)]

    return [Call.tokens(ids(index), length) for index in range(count)]
