"""The gate: what it is taught to predict, and how.

Difference form (the gate as a policy of its own): the score regresses on what the next span would gain if the
teacher wrote it, per teacher token; the price it is compared with at serving time plays lambda's part, so
that one gate serves all budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import PreTrainedModel

from router.checkpoint import RouterCheckpoint
from router.features import confidence
from router.gate import LearnedGate
from router.reserved import ReservedRows
from training.config import GateConfig
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
    """What a gate is fitted on. states: (N, H); target: (N,) nats, or points; asked: (N,) whether the teacher
    wrote there; row: (N,) the path that a position belongs to, in one piece; view: (N, 7) `teacher_view`.
    """

    states: Tensor
    target: Tensor
    asked: Tensor
    row: Tensor
    view: Tensor

    def __len__(self) -> int:
        return len(self.target)

    @classmethod
    def join(cls, parts: Sequence[Lessons]) -> Lessons:
        rows, first = [], 0
        for part in parts:
            rows.append(part.row + first)
            first = int(rows[-1].max()) + 1
        columns = (
            torch.cat([getattr(part, name) for part in parts])
            for name in ("states", "target", "asked", "view")
        )
        *before, view = columns
        return cls(*before, torch.cat(rows), view)


def teacher_view(at: Positions) -> Tensor:
    """(N, 7): what only the teacher knows of a position: how much less it likes the student's token than its
    own (nats, 0 where they agree; and as a ratio), how much it likes both, KL(student, teacher), its entropy.
    """
    excess = GAINS["excess"](at).clamp(min=0, max=8)
    columns = (excess, (-excess).exp(), at.regret, at.best, (-at.best).exp(), at.kl, at.entropy)
    return torch.stack(columns, dim=1)


# What asking at a position would gain there, in nats: (N,) from Positions.
GAINS: dict[str, Callable[[Positions], Tensor]] = {
    # -log p_T(own token): training.md's regret. Also large where the teacher itself has many good tokens.
    "regret": lambda p: p.regret,
    # The same above the teacher's best token: zero where both agree, small among synonyms.
    "excess": lambda p: p.regret - p.best,
    # 1 - p_T(own) / p_T(best): the share of the teacher's mass that the own token gives away; bounded.
    "ratio": lambda p: 1 - (p.best - p.regret).exp(),
    # The supervised label of R2R and others: harmless differences count like mistakes.
    "differs": lambda p: (p.own != p.theirs).float(),
    # The whole distribution's: dense, less noisy, blind to which token is really written.
    "kl": lambda p: p.kl,
}


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
