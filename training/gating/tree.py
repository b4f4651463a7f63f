"""The closed loop under greedy decoding, for many gates, prices, budgets and span lengths at once.

Greedy models are deterministic, so all completions of a prompt form a tree. It has a node for each prefix,
with the next tokens of student and teacher, which are equal at most nodes. A completion with some gate, price
and budget is a walk through the tree, and only new nodes cost a forward pass. For five gates and eleven
rates, this costs 50 times less than decoding each combination.
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

KEPT_BYTES = 4e9
"""Most bytes of prompts' keys and values that a tree keeps."""
ScoreGate = Gate | Callable[[Positions], Tensor]
"""A gate, or an oracle that sees more of a position than a gate sees."""


@dataclass(slots=True)
class Node:
    """A prefix, and the next tokens of the models after it."""

    index: int
    """Index of its row in the tree's tensors."""
    own: int
    """The student's next token."""
    theirs: list[int]
    """The next token of each teacher, from the cheapest to the dearest."""
    next: dict[int, "Node"] = field(default_factory=dict)
    """The nodes after this one, by the token that leads to them."""


class Prefix(NamedTuple):
    """A prefix at which the tree has to grow."""

    prompt: int
    """Number of the prompt."""
    tokens: tuple[int, ...]
    """Tokens of the completion so far."""


class Alone(Gate):
    """A gate that may ask only one of several teachers: its score is that teacher's output of `gate`."""

    def __init__(self, gate: TeachersGate, number: int) -> None:
        """``number``: number of the teacher, from the cheapest to the dearest."""
        super().__init__(gate.reserved)
        self.gate = gate
        self.number = number

    def forward(self, logits: Tensor) -> Tensor:
        """Scores of raw logits (…, V): the teacher's output of the gate."""
        return self.gate.worth(logits)[..., self.number]


PERIODIC = "periodic"
"""Name of a baseline that ignores the text: it asks at a share 1 - price of the positions, evenly spread."""


@dataclass(frozen=True)
class Setting:
    """The terms on which the completions of all prompts are written."""

    gate: str
    """Name of a gate that the tree scores, or PERIODIC."""
    price: float
    """Price: the gate asks if its score is above this."""
    fraction: float
    """Fraction of each completion's bucket."""
    span_tokens: int
    """Longest span, in tokens."""
    ask_tokens: int | None = None
    """Number of tokens in one call; None: a whole span."""
    spare: float | None = None
    """Price while a call fits into the fraction itself, without the bucket's credit; None: `price`."""


def ends(gate: str) -> list[Setting]:
    """The settings of the student alone and of the teacher alone."""
    return [Setting(gate, math.inf, 0.0, 1), Setting(gate, -math.inf, 1.0, 1)]


class WalkPlan(NamedTuple):
    """How one completion is written."""

    prompt: int
    """Number of the prompt."""
    setting: Setting
    decisions: Sequence[bool] = ()
    """Whether to ask at each of the first tokens, for calls of one token. After them, the gate decides."""


@dataclass(frozen=True)
class Walk:
    """One completion on its way through the tree."""

    prompt: int
    """Number of the prompt."""
    done: Rollout
    """The completion so far."""
    steps: Iterator[None]
    """Yields whenever the tree has to grow before the walk can go on."""

    def goes_on(self) -> bool:
        """Walk until the tree has to grow; False if the completion ends first."""
        for _ in self.steps:
            return True
        return False

    @property
    def prefix(self) -> Prefix:
        """The prefix at which the tree has to grow."""
        return Prefix(self.prompt, tuple(self.done.tokens))


class Tree:
    """The tree of each prompt, which grows when walks need new nodes.

    Args:
        loop: the pair; it must decode greedily.
        prompts: prompts as the student reads them, as token ids.
        gates: the gates that score the nodes, by name.
        teacher_prompts: prompts as the teacher reads them; None: the same.
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
        self._read_prompts = ReadPrompts(KEPT_BYTES)
        self._grow([Prefix(number, ()) for number in range(len(prompts))])
        for name, gate in gates.items():
            self.add(name, gate)

    def __len__(self) -> int:
        return self._size

    @property
    def prompt_tokens(self) -> list[int]:
        """Number of tokens in each prompt, as the teacher reads it."""
        return list(map(len, self._teacher_prompts))

    @property
    def positions(self) -> Positions:
        """The positions of all nodes, by index; `row` and `step` count only within one growth of the tree."""
        self._seen = [concatenate(self._seen)]
        return self._seen[0]

    def add(self, name: str, gate: ScoreGate) -> None:
        """Score all present and future nodes with a gate; a gate of the same name is replaced."""
        self._gates[name] = gate
        self._scores[name] = []
        self._worth[name] = []
        self._score(name, self.positions)

    def scores(self, name: str) -> Tensor:
        """(nodes,) scores of all present nodes by the gate of this name."""
        return torch.tensor(self._scores[name])

    def run(self, settings: Sequence[Setting]) -> list[list[Rollout]]:
        """The completions of all prompts, for each setting."""
        count = len(self._prompts)
        written = self.write([WalkPlan(prompt, setting) for setting in settings for prompt in range(count)])
        return [written[number * count : (number + 1) * count] for number in range(len(settings))]

    def write(self, plans: Sequence[WalkPlan]) -> list[Rollout]:
        """The completion of each plan."""
        completions = [Rollout() for _ in plans]
        walks = []
        for plan, done in zip(plans, completions, strict=True):
            walks.append(Walk(plan.prompt, done, self._walk(plan, done)))
        while walks:
            walks = [walk for walk in walks if walk.goes_on()]
            missing = dict.fromkeys(walk.prefix for walk in walks)
            self._grow(list(missing))
        return completions

    def _walk(self, plan: WalkPlan, done: Rollout) -> Iterator[None]:
        """Write a completion into `done`; yields whenever the tree has to grow before the walk can go on."""
        _, setting, decisions = plan
        node = self._roots[plan.prompt]
        bucket = Bucket(Budget(fraction=setting.fraction), setting.span_tokens, setting.ask_tokens)
        end = self._loop.end
        max_tokens = self._loop.max_tokens
        draft = Draft(bucket, max_tokens, done)
        for length in range(max_tokens):
            whom = None
            if length < len(decisions):
                whom = len(node.theirs) - 1 if decisions[length] else None
            elif draft.span_left == 0:
                whom = self._asked(node, length, setting, bucket)
            token = draft.write(node.own, node.theirs, whom is not None, whom or 0)
            if token == end or length + 1 == max_tokens:
                return
            if token not in node.next:
                yield
            node = node.next[token]

    def _asked(self, node: Node, length: int, setting: Setting, bucket: Bucket) -> int | None:
        """Number of the teacher that is asked at a node; None if the student writes."""
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
        """Number of the teacher that a gate asks at this price, if it asks."""
        gate = self._gates[name]
        if isinstance(gate, Alone):
            return gate.number
        if not isinstance(gate, TeachersGate):
            return len(node.theirs) - 1
        worth = torch.tensor(self._worth[name][node.index], device=gate.costs.device)
        return int(gate.margins(worth, worth.new_tensor(price)).argmax())

    def path(self, prompt: int, tokens: Sequence[int]) -> list[int]:
        """Indices of the nodes at which these tokens were written; the tree must have these nodes."""
        node = self._roots[prompt]
        indices = []
        for token in tokens[:-1]:
            indices.append(node.index)
            node = node.next[token]
        return [*indices, node.index]

    def _grow(self, prefixes: Sequence[Prefix]) -> None:
        """Add the nodes of the student's own continuation of each prefix, up to the end of a completion."""
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
        last: dict[int, Node] = {}  # the last node of each row; `seen` is in order of time
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
        """Keep a gate's scores of these positions."""
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
        """Values of `read`, a function of the gate, on the student's logits at these positions."""
        student = self._loop.student
        output = student.get_output_embeddings()
        readout = Readout.of(student.config)
        gate.to(student.device)
        scores = []
        for chunk in pieces_of(positions.states, len(output.weight)):
            logits = readout(chunk.to(student.device), output.weight, getattr(output, "bias", None))
            scores.append(read(logits))
        return torch.cat(scores)
