"""The gate: what it is taught to predict, and how.

Difference form (the gate as a policy of its own): the score regresses on what the next span would gain if the
teacher wrote it, per teacher token; the price it is compared with at serving time plays lambda's part, so
that one gate serves all budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import PreTrainedModel

from router.checkpoint import RouterCheckpoint
from router.features import confidence
from router.gate import LearnedGate
from router.reserved import ReservedRows
from training.gating.config import GateConfig, RatioGain, RegretGain
from training.gating.rollout import Completion, Cooperation, Positions, Request, concatenate
from training.reading import Readout

CHUNK = 4096  # positions at a time: their logits are as wide as the vocabulary


@dataclass(frozen=True)
class Trajectories:
    """Positions of many completions, in order of (row, step), as (N, ...) tensors; see `Positions`.

    by_teacher: (N,) whether the teacher wrote the token there.
    """

    positions: Positions
    by_teacher: Tensor

    def __len__(self) -> int:
        return len(self.by_teacher)


def collect(
    cooperation: Cooperation, requests: Sequence[Request], batch: int = 512
) -> tuple[Trajectories, list[Completion]]:
    seen: list[Positions] = []
    completions = cooperation.write(requests, batch=batch, watch=seen.append)
    joined = concatenate(seen)
    order = (joined.row * cooperation.max_tokens + joined.step).argsort()
    by_teacher = torch.tensor([flag for completion in completions for flag in completion.by_teacher])
    ordered = Positions(**{name: column[order] for name, column in vars(joined).items()})
    return Trajectories(ordered, by_teacher), completions


@dataclass(frozen=True)
class Lessons:
    """What a gate is fitted on: N positions, those of a path in one piece."""

    states: Tensor
    """(N, H) the student's."""
    target: Tensor
    """(N,) nats, or points."""
    asked: Tensor
    """(N,) whether the teacher wrote there."""
    row: Tensor
    """(N,) the path that a position belongs to."""
    source: Tensor
    """(N,) number of the path's source, the same for all paths from it."""
    view: Tensor
    """(N, 7) `teacher_view`."""

    def __len__(self) -> int:
        return len(self.target)

    @classmethod
    def join(cls, parts: Sequence[Lessons]) -> Lessons:
        """All of them, their paths numbered on."""
        rows, first = [], 0
        for part in parts:
            rows.append(part.row + first)
            first = int(rows[-1].max()) + 1
        columns = {}
        for field in fields(cls):
            columns[field.name] = torch.cat([getattr(part, field.name) for part in parts])
        return replace(cls(**columns), row=torch.cat(rows))

    def where(self, known: Tensor) -> Lessons:
        """At these positions (N,) only."""
        return Lessons(*(getattr(self, field.name)[known] for field in fields(self)))


def teacher_view(at: Positions) -> Tensor:
    """(N, 7): what only the teacher knows of a position: how much less it likes the student's token than its
    own (nats, 0 where they agree; and as a ratio), how much it likes both, KL(student, teacher), its entropy.
    """
    lost = regret(at).clamp(min=0, max=8)
    columns = (lost, (-lost).exp(), at.surprisal, at.best, (-at.best).exp(), at.kl, at.entropy)
    return torch.stack(columns, dim=1)


def regret(at: Positions) -> Tensor:
    """(N,) log p_T(best) - log p_T(own), nats: zero if both agree, small among synonyms."""
    return at.surprisal - at.best


def token_gain(config: RegretGain | RatioGain, at: Positions) -> Tensor:
    """(N,) what asking at a position would gain there."""
    if isinstance(config, RatioGain):
        return (1 - (-regret(at)).exp()).clamp(min=0)
    return regret(at).clamp(0, config.clip)


def span_gain(gain: Tensor, trajectories: Trajectories, span: int) -> tuple[Tensor, Tensor]:
    """Mean over the student's own next `span` tokens of gain (N,), and where it is known (N,) bool.

    A position is known when the student itself wrote every token of the span before its last; spans that run
    over the end of the completion count the missing tokens as zero.
    """
    row, step = trajectories.positions.row, trajectories.positions.step
    total, known = gain.clone(), torch.ones_like(trajectories.by_teacher)
    own = ~trajectories.by_teacher
    for ahead in range(1, span):
        follows = (row[ahead:] == row[:-ahead]) & (step[ahead:] == step[:-ahead] + ahead)
        total[:-ahead] += torch.where(follows, gain[ahead:], 0.0)
        known[:-ahead] &= ~follows | own[ahead - 1 : -1]
    return total / span, known


class Head(nn.Module):
    """Taps and learned gate over a frozen student, as they will be merged into it."""

    def __init__(self, student: PreTrainedModel, reserved: ReservedRows, width: int) -> None:
        super().__init__()
        self.gate = LearnedGate(reserved, width)
        self.taps = nn.Parameter(torch.zeros(reserved.count - 1, student.config.hidden_size))
        output = student.get_output_embeddings()
        self.register_buffer("visible", output.weight[: reserved.start].detach().clone())
        bias = getattr(output, "bias", None)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._readout = Readout.of(student.config)

    def start_from(self, states: Tensor) -> None:
        """Taps = the directions of most variance of states (N, H); features standardised on them."""
        _, _, directions = torch.pca_lowrank(states, q=min(self.taps.shape), niter=4)
        self.taps.data[: directions.shape[1]] = directions.T
        with torch.no_grad():
            x = self.features(states.to(self.taps.device), self.confidence(states))
        self.gate.mean.copy_(x.mean(0))
        self.gate.scale.copy_(1 / x.std(0).clamp(min=1e-3))

    @classmethod
    def of(cls, student: PreTrainedModel, checkpoint: RouterCheckpoint) -> Head:
        head = cls(student, checkpoint.reserved, checkpoint.config.gate_width)
        head.taps.data.copy_(checkpoint.taps)
        head.gate.load_state_dict(checkpoint.gate)
        return head.requires_grad_(False).eval()

    def logits(self, states: Tensor) -> Tensor:
        """(N, H) -> (N, V): what the merged student computes there. The escalation row stays 0."""
        escalation = states.new_zeros(len(states), 1)
        return torch.cat((self._visible_logits(states), escalation, self._tapped(states)), dim=-1)

    def _visible_logits(self, states: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias[: len(self.visible)]
        return self._readout(states, self.visible, bias)

    def _tapped(self, states: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias[self.gate.reserved.taps]
        return self._readout(states, self.taps, bias)

    @torch.no_grad()
    def confidence(self, states: Tensor) -> Tensor:
        """(N, H) -> (N, 10): the features that training does not change. As wide as the vocabulary while they
        are computed, so in pieces and once.
        """
        features = []
        for chunk in states.split(CHUNK):
            logits = self._visible_logits(chunk.to(self.taps.device))
            features.append(confidence(logits, self.gate.reserved))
        return torch.cat(features)

    def features(self, states: Tensor, confidence: Tensor) -> Tensor:
        """(N, F): what the gate sees, as `router.features` computes it from logits."""
        return torch.cat((self._tapped(states), confidence), dim=-1)

    def forward(self, states: Tensor) -> Tensor:
        """Scores (N,) of states (N, H)."""
        return self.gate(self.logits(states))

    @torch.no_grad()
    def scores(self, states: Tensor) -> Tensor:
        """(N,) of states (N, H), in pieces, on the CPU."""
        return torch.cat([self(chunk.to(self.taps.device)).cpu() for chunk in states.split(CHUNK)])


def fit(head: Head, lessons: Lessons, config: GateConfig, seed: int) -> dict[str, float]:
    """Least squares of the score on the target; `loss` is the last epoch's mean."""
    device, states, target = head.taps.device, lessons.states, lessons.target
    confidence = head.confidence(states)
    generator = torch.Generator().manual_seed(seed)

    def loss(chunk: Tensor) -> Tensor:
        x = head.features(states[chunk].to(device), confidence[chunk])
        return mse_loss(head.gate.score(x), target[chunk].to(device))

    def epoch() -> Sequence[Tensor]:
        return torch.randperm(len(states), generator=generator).split(config.batch)

    last = descend(list(head.parameters()), -(-len(states) // config.batch), epoch, loss, config)
    return {"loss": last}


Part = TypeVar("Part")


def descend(
    parameters: list[nn.Parameter],
    steps: int,
    epoch: Callable[[], Iterable[Part]],
    loss: Callable[[Part], Tensor],
    config: GateConfig,
) -> float:
    """`config.epochs` epochs of AdamW, one cycle of the learning rate; returns the last epoch's mean loss.

    epoch: the parts of one, of which there are `steps`, in an order of its own.
    """
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.epochs * steps, pct_start=0.1
    )
    mean = 0.0
    for _ in range(config.epochs):
        losses = []
        for part in epoch():
            value = loss(part)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            losses.append(value.item())
        mean = sum(losses) / len(losses)
    return mean
