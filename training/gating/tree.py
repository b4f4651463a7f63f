"""The closed loop under greedy decoding, for many gates, prices, budgets and span lengths at once.

Both models are deterministic then, so what can happen to a prompt is a tree: a node per prefix, with the
student's and the teacher's next token, which are the same token at most nodes. A setting is a walk through
it; only nodes that no walk has seen cost a forward pass. A grid of five gates and eleven rates costs 50 times
less than decoding it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from router.budget import Bucket, Budget
from router.gate import Gate
from training.gating.head import CHUNK
from training.gating.rollout import ClosedLoop, Draft, Positions, Request, Rollout, concatenate
from training.reading import Readout

ScoreGate = Gate | Callable[[Positions], Tensor]
"""A gate, or an oracle that sees more than a gate may."""


@dataclass(slots=True)
class Node:
    """A prefix. own, theirs: next token of student and teacher; index: of its row in the tree's tensors."""

    index: int
    own: int
    theirs: int
    next: dict[int, "Node"] = field(default_factory=dict)


PERIODIC = "periodic"
"""A baseline that looks at nothing but the place: it asks at a share 1 - price of the positions, evenly."""


@dataclass(frozen=True)
class Setting:
    """gate: a name that the tree scores, or PERIODIC."""

    gate: str
    price: float
    fraction: float
    span_tokens: int
    ask_tokens: int | None = None
    spare: float | None = None
    """Price while a call fits into the fraction itself; None: the same."""


def ends(gate: str) -> list[Setting]:
    """Student alone and teacher alone."""
    return [Setting(gate, math.inf, 0.0, 1), Setting(gate, -math.inf, 1.0, 1)]


class Tree:
    """Grows on demand below each of `prompts`; `loop` must decode greedily. hidden: first tokens of
    every prompt that the teacher does not see.
    """

    def __init__(
        self,
        loop: ClosedLoop,
        prompts: Sequence[list[int]],
        gates: dict[str, ScoreGate],
        hidden: int = 0,
    ) -> None:
        if loop.temperature or loop.explore:
            raise ValueError("the tree holds greedy decoding only")
        self._loop, self._prompts, self._hidden = loop, prompts, hidden
        self._seen: list[Positions] = []
        self._scores: dict[str, list[float]] = {}
        self._gates: dict[str, ScoreGate] = {}
        self._roots: list[Node | None] = [None] * len(prompts)
        self._size = 0
        self._grow([(i, []) for i in range(len(prompts))])
        for name, gate in gates.items():
            self.add(name, gate)

    def __len__(self) -> int:
        return self._size

    @property
    def prompt_tokens(self) -> list[int]:
        """Of the prompts as the teacher reads them."""
        return [len(prompt) - self._hidden for prompt in self._prompts]

    @property
    def positions(self) -> Positions:
        """Of all nodes, by their index; `row` and `step` count within one growth of the tree only."""
        self._seen = [concatenate(self._seen)]
        return self._seen[0]

    def add(self, name: str, gate: ScoreGate) -> None:
        """Score all nodes, present and future; a gate of the same name is replaced."""
        self._gates[name] = gate
        self._scores[name] = self._score(gate, self.positions)

    def scores(self, name: str) -> Tensor:
        """(nodes,)"""
        return torch.tensor(self._scores[name])

    def run(self, settings: Sequence[Setting]) -> list[list[Rollout]]:
        """For each setting the completions of all prompts."""
        runs = [[Rollout() for _ in self._prompts] for _ in settings]
        walks = [
            (p, done, self._walk(self._roots[p], setting, done))
            for run, setting in zip(runs, settings, strict=True)
            for p, done in enumerate(run)
        ]
        while walks:
            walks = [walk for walk in walks if next(walk[2], False)]
            missing = dict.fromkeys((p, tuple(done.tokens)) for p, done, _ in walks)
            self._grow([(p, list(prefix)) for p, prefix in missing])
        return runs

    def _walk(self, node: Node, setting: Setting, done: Rollout) -> Iterator[bool]:
        """Writes `done`; yields True where the tree has to grow before the walk can go on."""
        bucket = Bucket(Budget(fraction=setting.fraction), setting.span_tokens, setting.ask_tokens)
        end, max_tokens = self._loop.end, self._loop.max_tokens
        draft = Draft(bucket, max_tokens, done)
        for length in range(max_tokens):
            asks = draft.span_left == 0 and self._wants(node, length, setting, bucket)
            token = draft.write(node.own, node.theirs, asks)
            if token == end or length + 1 == max_tokens:
                return
            if token not in node.next:
                yield True
            node = node.next[token]

    def _wants(self, node: Node, length: int, setting: Setting, bucket: Bucket) -> bool:
        if setting.gate == PERIODIC:
            rate = 1 - setting.price
            return math.floor((length + 1) * rate) > math.floor(length * rate)
        price = setting.price
        if setting.spare is not None and length >= (bucket.spare_from() or 0):
            price = min(price, setting.spare)
        return self._scores[setting.gate][node.index] > price

    def path(self, prompt: int, tokens: Sequence[int]) -> list[int]:
        """Indices of the nodes at which these tokens, which the tree holds, were written."""
        node, indices = self._roots[prompt], []
        for token in tokens[:-1]:
            indices.append(node.index)
            node = node.next[token]
        return [*indices, node.index]

    def _grow(self, prefixes: list[tuple[int, list[int]]]) -> None:
        """Add the nodes of the student's own way on from each (prompt, prefix)."""
        if not prefixes:
            return
        requests = [Request(self._prompts[p] + prefix, hidden=self._hidden) for p, prefix in prefixes]
        seen: list[Positions] = []
        self._loop.write(requests, watch=seen.append)
        new = concatenate(seen)
        self._seen.append(new)
        at: list[Node | None] = [None] * len(prefixes)  # last node of each row; `seen` is in order of time
        for row, own, theirs in zip(new.row.tolist(), new.own.tolist(), new.theirs.tolist(), strict=True):
            node = Node(self._size, own, theirs)
            self._size += 1
            last = at[row]
            if last is None:
                self._attach(*prefixes[row], node)
            else:
                last.next[last.own] = node
            at[row] = node
        for name, gate in self._gates.items():
            self._scores[name] += self._score(gate, new)

    def _attach(self, prompt: int, prefix: list[int], node: Node) -> None:
        parent = self._roots[prompt]
        if parent is None:
            self._roots[prompt] = node
            return
        for token in prefix[:-1]:
            parent = parent.next[token]
        parent.next[prefix[-1]] = node

    @torch.no_grad()
    def _score(self, gate: ScoreGate, positions: Positions) -> list[float]:
        if not isinstance(gate, Gate):
            return gate(positions).tolist()
        student = self._loop.student
        output, readout = student.get_output_embeddings(), Readout.of(student.config)
        gate.to(student.device)
        scores = []
        for chunk in positions.states.split(CHUNK):
            logits = readout(chunk.to(student.device), output.weight, getattr(output, "bias", None))
            scores.append(gate(logits))
        return torch.cat(scores).tolist()
