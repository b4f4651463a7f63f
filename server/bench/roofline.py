"""Predicted tokens/s of two models on one machine, from its datasheet and their published shapes.

A step of an engine moves bytes and computes. The slower of the two decides (Williams, Waterman and Patterson
2009, "Roofline", doi:10.1145/1498765.1498785). This module adds a fixed cost for each step, and a model of
two engines that share a card. Speculative decoding is Leviathan et al. 2023 (arXiv 2211.17192, equation 1).
The number of streams at each engine follows from Little's law, as in approximate mean value analysis
(Schweitzer 1979). Units: seconds, bytes, FLOPs; a multiplication and an addition are two FLOPs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from router.errors import UnusableInput
from server.bench.cost_model import Traffic

BF16 = 2
"""Bytes of a number in BF16."""
FP8 = 1
"""Bytes of a number in FP8."""
ROUNDS = 400
"""Rounds of the iteration that spreads streams over two engines; each goes half of a step, so it settles."""


@dataclass(frozen=True)
class DecoderShape:
    """A decoder's sizes, as in its `config.json`: grouped-query attention, gated feed-forward."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int
    vocabulary: int
    tied: bool
    """Whether one matrix serves input and output."""

    @property
    def layer_weights(self) -> int:
        """Weights of all layers that a step reads; norms are left out."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_size
        return self.layers * (attention + 3 * self.hidden * self.feed_forward)

    @property
    def matrix(self) -> int:
        """Weights of the output matrix. The input matrix is as large, but a step reads few rows of it."""
        return self.hidden * self.vocabulary

    def model(self, weight: int = BF16) -> "Model":
        """The costs if each weight of a layer has ``weight`` bytes; numbers of matrices and cache have 2.

        Tensor cores compute twice as fast in FP8, so its FLOPs count half.
        """
        return Model(
            name=self.name if weight == BF16 else f"{self.name} in FP8",
            resident=self.layer_weights * weight + self.matrix * BF16 * (1 if self.tied else 2),
            weights=self.layer_weights * weight + self.matrix * BF16,
            flops=2 * self.layer_weights * weight / BF16 + 2 * self.matrix,
            cache=2 * self.layers * self.kv_heads * self.head_size * BF16,
        )


@dataclass(frozen=True)
class Model:
    """Costs of the steps of one model."""

    name: str
    resident: float
    """Bytes of memory that the model occupies."""
    weights: float
    """Bytes of weights that every step reads."""
    flops: float
    """FLOPs of a position. Attention is left out: 2 % at 600 tokens of context, 25 % at 8,000."""
    cache: float
    """Bytes of the keys and values of a token. A step reads those of every earlier token."""


@dataclass(frozen=True)
class Machine:
    """Speed and memory of a card, or of a core, in practice."""

    bandwidth: float
    """Memory bandwidth in bytes a second."""
    flops: float
    """FLOPs a second."""
    memory: float
    """Bytes for weights and caches."""
    step: float
    """Fixed seconds of a step, in addition to its work: scheduling, launches, sampling."""
    draft: float
    """Fixed seconds of a step of a draft model, inside a step of its target."""
    call: float
    """Seconds of a teacher call outside both engines."""
    block: int
    """Tokens of a block of the prefix cache. Half of the last block is read again at every visit."""
    overlaps: bool = True
    """Whether the machine reads weights while it computes. A GPU does; one core of a CPU hardly does."""
    one_card: bool = True
    """Whether both engines share the card. Otherwise each engine has one like it."""

    def work(self, model: Model, streams: float, positions: float, context: float) -> float:
        """Seconds of a step that need the card.

        Args:
            model: the model of the step.
            streams: number of requests in the step.
            positions: number of tokens in the step, of all its requests.
            context: number of earlier tokens of each request.
        """
        weights = model.weights / self.bandwidth
        compute = positions * model.flops / self.flops
        cache = streams * context * model.cache / self.bandwidth
        return cache + (max(weights, compute) if self.overlaps else weights + compute)

    def reading(self, model: Model, positions: float) -> float:
        """Seconds to read this many tokens of prompts, if they are enough to be bound by FLOPs."""
        return positions * model.flops / self.flops

    def room(self, models: Sequence[Model], context: float) -> float:
        """Number of requests whose caches fit into memory next to the weights."""
        if not self.one_card:
            return min(self._room([model], context) for model in models)
        return self._room(models, context)

    def _room(self, models: Sequence[Model], context: float) -> float:
        free = self.memory - sum(model.resident for model in models)
        each = context * sum(model.cache for model in models)
        return free / each if each else math.inf


class TooLarge(UnusableInput):
    """The models leave no memory for one request."""


class Speculation(NamedTuple):
    """The highest speed of speculative decoding, and the drafts for it."""

    tokens_per_second: float
    drafts: int
    """Number of tokens of a draft at this speed."""


@dataclass(frozen=True)
class Load:
    """Requests of one kind, ``streams`` at a time; requests that do not fit into memory wait."""

    traffic: Traffic
    streams: int
    cached: float = 0.0
    """Tokens before the prompt that are already in all caches: earlier turns of a conversation."""

    @property
    def context(self) -> float:
        """Average number of tokens before a position."""
        return self.cached + self.traffic.prompt + self.traffic.completion / 2

    def running(self, machine: Machine, models: Sequence[Model]) -> int:
        """Number of requests that run at a time.

        Raises:
            TooLarge: there is not enough memory for one.
        """
        running = int(min(self.streams, machine.room(models, self.context)))
        if running < 1:
            raise TooLarge(f"{' and '.join(model.name for model in models)} leave no memory for a request")
        return running


def alone(machine: Machine, model: Model, load: Load) -> float:
    """Tokens a second of one model.

    Raises:
        TooLarge: there is not enough memory.
    """
    streams = load.running(machine, [model])
    step = machine.step + machine.work(model, streams, streams, load.context)
    prompts = machine.reading(model, streams * load.traffic.prompt / load.traffic.completion)
    return streams / (step + prompts)


def accepted(acceptance: float, drafts: int) -> float:
    """Average tokens that one step of speculative decoding writes, including the target's own token.

    Args:
        acceptance: probability that a drafted token is right, if all before it are.
        drafts: tokens of a draft.
    """
    return sum(acceptance**count for count in range(drafts + 1))


def speculative(
    machine: Machine, draft: Model, target: Model, load: Load, acceptance: float, drafts: int
) -> float:
    """Tokens a second of speculative decoding with drafts of a fixed length.

    Raises:
        TooLarge: there is not enough memory.
    """
    streams = load.running(machine, [draft, target])
    step = machine.step + machine.work(target, streams, streams * (drafts + 1), load.context)
    step += drafts * (machine.draft + machine.work(draft, streams, streams, load.context))
    written = streams * accepted(acceptance, drafts)
    prompts = written * load.traffic.prompt / load.traffic.completion
    step += machine.reading(target, prompts) + machine.reading(draft, prompts)
    return written / step


def best_speculation(
    machine: Machine, draft: Model, target: Model, load: Load, acceptance: float, most: int = 8
) -> Speculation:
    """Speculative decoding with drafts of the best length for this load, up to ``most`` tokens.

    Raises:
        TooLarge: there is not enough memory.
    """
    return max(
        Speculation(speculative(machine, draft, target, load, acceptance, drafts), drafts)
        for drafts in range(1, most + 1)
    )


@dataclass(frozen=True)
class Engine:
    """One of two engines that write a completion in turn: a request visits it, and leaves for the other."""

    machine: Machine
    model: Model
    writes: float
    """Tokens that the engine writes in a visit."""
    reads: float
    """Tokens that the engine reads in a visit: the other engine's, and a part of a block."""
    prompt: float
    """Tokens of prompts that are read for a visit, on average."""
    context: float

    def work(self, streams: float) -> float:
        """Seconds of a step that need the card, with an average of ``streams`` requests at this engine.

        With fewer than one, a step has one request, and runs only a part of the time.
        """
        batch = max(1.0, streams)
        positions = batch * (self.reads + self.writes) / self.writes
        prompts = self.machine.reading(self.model, batch * self.prompt / self.writes)
        return self.machine.work(self.model, batch, positions, self.context) + prompts

    def busy(self, streams: float) -> float:
        """Share of the time in which the engine needs the card."""
        work = self.work(streams)
        return min(1.0, streams) * work / (work + self.machine.step)

    def visit(self, here: float, others: float, rival: float) -> float:
        """Seconds of a visit.

        Args:
            here: average number of requests at this engine.
            others: average number of other requests that an arriving request finds here.
            rival: share of the time in which the other engine needs the card, as an arriving request sees it.
        """
        step = self.machine.step + self.work(here) * (1 + (rival if self.machine.one_card else 0.0))
        # A request that arrives waits for the step that runs.
        return self.writes * step + min(1.0, others) * step / 2


def cooperation(machine: Machine, student: Model, teacher: Model, load: Load) -> float:
    """Tokens a second of a student that asks a teacher, at the traffic's rate and tokens of a call.

    Raises:
        TooLarge: there is not enough memory.
    """
    traffic = load.traffic
    streams = load.running(machine, [student, teacher])
    theirs = traffic.call_tokens
    ours = theirs * (1 - traffic.rate) / traffic.rate
    part = machine.block / 2
    prompt = traffic.prompt / traffic.calls
    # Calls are at random places: some requests have none, and no call reads the tokens after the last one.
    asking = 1 - math.exp(-traffic.calls)
    read = ours * (1 - asking / traffic.calls)
    writer = Engine(machine, student, ours, theirs + part, prompt, load.context)
    helper = Engine(machine, teacher, theirs, read + part, prompt * asking, load.context)
    seen = (streams - 1) / streams
    writing = helping = streams / 2
    cycle = 0.0
    for _ in range(ROUNDS):
        here = writer.visit(writing, writing * seen, helper.busy(helping * seen))
        there = helper.visit(helping, helping * seen, writer.busy(writing * seen))
        cycle = here + there + machine.call
        writing = (writing + streams * here / cycle) / 2
        helping = (helping + streams * there / cycle) / 2
    return streams * (ours + theirs) / cycle
