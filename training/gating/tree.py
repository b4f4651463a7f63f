"""The closed loop under greedy decoding, for many gates, prices, budgets and span lengths at once.

Both models are deterministic then, so what can happen to a prompt is a tree: a node per prefix, with the
student's and the teacher's next token, which are the same token at most nodes. A setting is a walk through
it; only nodes that no walk has seen cost a forward pass. A grid of five gates and eleven rates costs 50 times
less than decoding it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from router.budget import Bucket, Budget
from router.gate import Gate, TeachersGate
from training.gating.rollout import ClosedLoop, Draft, Positions, Request, Rollout, concatenate
from training.pieces import pieces_of
from training.read_prompts import ReadPrompts
from training.reading import Readout

PROMPTS = 4e9
"""Bytes of the keys and values of prompts that a tree keeps."""
ScoreGate = Gate | Callable[[Positions], Tensor]
"""A gate, or an oracle that sees more than a gate may."""


@dataclass(slots=True)
class Node:
    """A prefix, and what the models write after it."""

    index: int
    """Of its row in the tree's tensors."""
    own: int
    """The student's next token."""
    theirs: list[int]
    """The next token of each teacher, from the cheapest to the dearest."""
    next: dict[int, "Node"] = field(default_factory=dict)


class Prefix(NamedTuple):
    """Where the tree grows."""

    prompt: int
    """Its number."""
    tokens: tuple[int, ...]
    """Of the completion so far."""


class Alone(Gate):
    """One output of a gate that has one for each of several teachers: what asking that one is worth."""

    def __init__(self, gate: TeachersGate, number: int) -> None:
        """``number``: of the teacher, from the cheapest to the dearest."""
        super().__init__(gate.reserved)
        self.gate = gate
        self.number = number

    def forward(self, logits: Tensor) -> Tensor:
        """The output."""
        return self.gate.worth(logits)[..., self.number]


PERIODIC = "periodic"
"""A baseline that looks at nothing but the place: it asks at a share 1 - price of the positions, evenly."""


@dataclass(frozen=True)
class Setting:
    """Terms on which the completions of all prompts are written."""

    gate: str
    """A name that the tree scores, or PERIODIC."""
    price: float
    fraction: float
    span_tokens: int
    ask_tokens: int | None = None
    spare: float | None = None
    """Price while a call fits into the fraction itself; None: the same."""


def ends(gate: str) -> list[Setting]:
    """Student alone and teacher alone."""
    return [Setting(gate, math.inf, 0.0, 1), Setting(gate, -math.inf, 1.0, 1)]


@dataclass(frozen=True)
class Walk:
    """One completion on its way through the tree."""

    prompt: int
    """Its number."""
    done: Rollout
    """What is written so far."""
    steps: Iterator[None]
    """Yields when the tree has to grow before the walk can go on."""

    def goes_on(self) -> bool:
        """Walk until the tree has to grow; False if the completion ends first."""
        for _ in self.steps:
            return True
        return False

    @property
    def prefix(self) -> Prefix:
        """Where the tree has to grow."""
        return Prefix(self.prompt, tuple(self.done.tokens))


class Tree:
    """Grows on demand below each prompt.

    Args:
        loop: must decode greedily.
        prompts: as the student reads them.
        gates: that score the nodes, by name.
        teacher_prompts: as the teacher reads them; None: the same.
    """

    def __init__(
        self,
        loop: ClosedLoop,
        prompts: Sequence[list[int]],
        gates: Mapping[str, ScoreGate],
        teacher_prompts: Sequence[list[int]] | None = None,
    ) -> None:
        if loop.temperature or loop.explore:
            raise ValueError("the tree holds greedy decoding only")
        self._loop = loop
        self._prompts = prompts
        self._teacher_prompts = prompts if teacher_prompts is None else teacher_prompts
        self._seen: list[Positions] = []
        self._scores: dict[str, list[float]] = {}
        self._worth: dict[str, list[list[float]]] = {}
        self._gates: dict[str, ScoreGate] = {}
        self._roots: dict[int, Node] = {}
        self._size = 0
        self._read_prompts = ReadPrompts(PROMPTS)
        self._grow([Prefix(number, ()) for number in range(len(prompts))])
        for name, gate in gates.items():
            self.add(name, gate)

    def __len__(self) -> int:
        return self._size

    @property
    def prompt_tokens(self) -> list[int]:
        """Of the prompts as the teacher reads them."""
        return list(map(len, self._teacher_prompts))

    @property
    def positions(self) -> Positions:
        """Of all nodes, by their index; `row` and `step` count within one growth of the tree only."""
        self._seen = [concatenate(self._seen)]
        return self._seen[0]

    def add(self, name: str, gate: ScoreGate) -> None:
        """Score all nodes, present and future; a gate of the same name is replaced."""
        self._gates[name] = gate
        self._scores[name] = []
        self._worth[name] = []
        self._score(name, self.positions)

    def scores(self, name: str) -> Tensor:
        """The gate's scores of all nodes: (nodes,)."""
        return torch.tensor(self._scores[name])

    def run(self, settings: Sequence[Setting]) -> list[list[Rollout]]:
        """For each setting the completions of all prompts."""
        runs = []
        walks = []
        for setting in settings:
            run = []
            for prompt in range(len(self._prompts)):
                done = Rollout()
                run.append(done)
                walks.append(Walk(prompt, done, self._walk(self._roots[prompt], setting, done)))
            runs.append(run)
        while walks:
            walks = [walk for walk in walks if walk.goes_on()]
            missing = dict.fromkeys(walk.prefix for walk in walks)
            self._grow(list(missing))
        return runs

    def _walk(self, node: Node, setting: Setting, done: Rollout) -> Iterator[None]:
        """Writes `done`; yields when the tree has to grow before the walk can go on."""
        bucket = Bucket(Budget(fraction=setting.fraction), setting.span_tokens, setting.ask_tokens)
        end = self._loop.end
        max_tokens = self._loop.max_tokens
        draft = Draft(bucket, max_tokens, done)
        for length in range(max_tokens):
            whom = None
            if draft.span_left == 0:
                whom = self._asked(node, length, setting, bucket)
            token = draft.write(node.own, node.theirs, whom is not None, whom or 0)
            if token == end or length + 1 == max_tokens:
                return
            if token not in node.next:
                yield
            node = node.next[token]

    def _asked(self, node: Node, length: int, setting: Setting, bucket: Bucket) -> int | None:
        """The number of the teacher that is asked; None if none is."""
        dearest = len(node.theirs) - 1
        if setting.gate == PERIODIC:
            rate = 1 - setting.price
            return dearest if math.floor((length + 1) * rate) > math.floor(length * rate) else None
        price = setting.price
        if setting.spare is not None and length >= (bucket.spare_from() or 0):
            price = min(price, setting.spare)
        if not self._scores[setting.gate][node.index] > price:
            return None
        return self._meant(setting.gate, node, price) if price > -math.inf else dearest

    def _meant(self, name: str, node: Node, price: float) -> int:
        """The number of the teacher that a gate means at a price, if it asks."""
        gate = self._gates[name]
        if isinstance(gate, Alone):
            return gate.number
        if not isinstance(gate, TeachersGate):
            return len(node.theirs) - 1
        worth = torch.tensor(self._worth[name][node.index], device=gate.costs.device)
        return int(gate.margins(worth, worth.new_tensor(price)).argmax())

    def path(self, prompt: int, tokens: Sequence[int]) -> list[int]:
        """Indices of the nodes at which these tokens, which the tree holds, were written."""
        node = self._roots[prompt]
        indices = []
        for token in tokens[:-1]:
            indices.append(node.index)
            node = node.next[token]
        return [*indices, node.index]

    def _grow(self, prefixes: Sequence[Prefix]) -> None:
        """Add the nodes of the student's own way on from each prefix, as far as a completion goes."""
        if not prefixes:
            return
        requests = []
        for prefix in prefixes:
            request = Request(
                self._prompts[prefix.prompt],
                teacher_prompt=self._teacher_prompts[prefix.prompt],
                max_tokens=self._loop.max_tokens - len(prefix.tokens),
                begun=list(prefix.tokens),
            )
            requests.append(request)
        seen: list[Positions] = []
        self._loop.write(requests, watch=seen.append, kept=self._read_prompts)
        new = concatenate(seen)
        self._seen.append(new)
        last: dict[int, Node] = {}  # of each row; `seen` is in order of time
        of_all = torch.cat((new.cheaper, new.theirs[:, None]), dim=1)
        for row, own, theirs in zip(new.row.tolist(), new.own.tolist(), of_all.tolist(), strict=True):
            node = Node(self._size, own, theirs)
            self._size += 1
            if row in last:
                last[row].next[last[row].own] = node
            else:
                self._attach(prefixes[row], node)
            last[row] = node
        for name in self._gates:
            self._score(name, new)

    def _attach(self, prefix: Prefix, node: Node) -> None:
        if not prefix.tokens:
            self._roots[prefix.prompt] = node
            return
        parent = self._roots[prefix.prompt]
        for token in prefix.tokens[:-1]:
            parent = parent.next[token]
        parent.next[prefix.tokens[-1]] = node

    def _score(self, name: str, positions: Positions) -> None:
        """Keep what a gate says of these positions."""
        gate = self._gates[name]
        if isinstance(gate, TeachersGate):
            worth = self._read(gate, gate.worth, positions)
            self._worth[name] += worth.tolist()
            self._scores[name] += gate.common(worth).tolist()
        elif isinstance(gate, Gate):
            self._scores[name] += self._read(gate, gate, positions).tolist()
        else:
            self._scores[name] += gate(positions).tolist()

    @torch.no_grad()
    def _read(self, gate: Gate, read: Callable[[Tensor], Tensor], positions: Positions) -> Tensor:
        """What a part of the gate makes of the student's logits there."""
        student = self._loop.student
        output = student.get_output_embeddings()
        readout = Readout.of(student.config)
        gate.to(student.device)
        scores = []
        for chunk in pieces_of(positions.states, len(output.weight)):
            logits = readout(chunk.to(student.device), output.weight, getattr(output, "bias", None))
            scores.append(read(logits))
        return torch.cat(scores)
