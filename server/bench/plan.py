"""What a run of `wheels bench` measures with, shared by its sections."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from server.bench.heavy import deepen
from server.bench.load import Call
from server.local.measure import Example
from server.local.pair import Pair

if TYPE_CHECKING:
    from server.bench.servers import Server
    from server.bench.together import Together


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

    @cached_property
    def students(self) -> "tuple[Server, Server]":
        """vLLM's own server with the student and a gateway (asked with a budget of 0), on the same core."""
        from server.bench.servers import FIRST, LAST, gateway, started, stock

        teacher = stock(self.pair.teacher, self.work, "light-teacher", LAST)
        theirs = stock(self.pair.student, self.work, "stock", FIRST)
        ours = gateway(self.pair, teacher, self.work, name="light-gateway")
        _, *students = self.open.enter_context(started([teacher, theirs], [ours]))
        return tuple(students)

    @cached_property
    def heavies(self) -> "tuple[Server, Server]":
        """The heavy teacher's server and a gateway in front of it, on a core each."""
        from server.bench.servers import LAST, gateway, started, stock

        teacher = stock(self.heavy.teacher, self.work, "teacher", LAST)
        ours = gateway(self.heavy, teacher, self.work)
        return tuple(self.open.enter_context(started([teacher], [ours])))

    @cached_property
    def together(self) -> "Together":
        """What two sections are made of; measured once."""
        from server.bench import together

        return together.run(self)

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
