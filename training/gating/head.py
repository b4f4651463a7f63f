"""Taps and learned gate over a frozen student."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from router.checkpoint import RouterCheckpoint, new_gate
from router.features import confidence
from router.gate import LearnedGate
from router.reserved import ReservedRows
from training.pieces import pieces_of
from training.reading import Readout, bias_of


class Head(nn.Module):
    """Taps and learned gate over a frozen student, as they will be merged into it."""

    visible: Tensor
    """(V, H) the student's output matrix without the reserved rows."""
    bias: Tensor | None
    """Of the output matrix."""

    def __init__(
        self, student: PreTrainedModel, reserved: ReservedRows, width: int, costs: Sequence[float] = ()
    ) -> None:
        """``costs``: of each teacher's token, for a gate with an output for each."""
        super().__init__()
        self.gate: LearnedGate = new_gate(reserved, width, costs)
        output = student.get_output_embeddings()
        self.taps = nn.Parameter(torch.zeros(reserved.count - 1, output.weight.shape[1]))
        self.register_buffer("visible", output.weight[: reserved.start].detach().clone())
        bias = bias_of(student, reserved.end)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._readout = Readout.of(student.config)

    def start_from(self, states: Tensor, known: Tensor | None = None) -> None:
        """Taps = the directions of most variance of states (N, H); features standardised on them.

        `known` is their `confidence`, if it was computed before.
        """
        _, _, directions = torch.pca_lowrank(states, q=min(self.taps.shape), niter=4)
        self.taps.data[: directions.shape[1]] = directions.T
        with torch.no_grad():
            confidence = self.confidence(states) if known is None else known.to(self.taps.device)
            x = self.features(states.to(self.taps.device), confidence)
        self.gate.mean.copy_(x.mean(0))
        self.gate.scale.copy_(1 / x.std(0).clamp(min=1e-3))

    @classmethod
    def of(cls, student: PreTrainedModel, checkpoint: RouterCheckpoint) -> "Head":
        """What a checkpoint holds, over its student."""
        costs = [teacher.cost for teacher in checkpoint.config.teachers]
        head = cls(student, checkpoint.reserved, checkpoint.config.gate_width, costs)
        head.taps.data.copy_(checkpoint.taps)
        head.gate.load_state_dict(checkpoint.gate)
        return head.requires_grad_(False).eval()

    def install(self, student: PreTrainedModel) -> None:
        """Write the taps into the student: in memory what `RouterCheckpoint.merge` does to its files."""
        student.get_output_embeddings().weight.data[self.gate.reserved.taps] = self.taps.detach()

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
        """(N, H) -> (N, 10): the features that training does not change.

        They are as wide as the vocabulary while they are computed, so in pieces and once.
        """
        features = []
        for chunk in pieces_of(states, len(self.visible)):
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
    def scores(self, states: Tensor, known: Tensor | None = None) -> Tensor:
        """(N,) of states (N, H), on the CPU: in pieces, or from their `confidence` if it is known."""
        if known is not None:
            x = self.features(states.to(self.taps.device), known.to(self.taps.device))
            return self.gate.score(x).cpu()
        return torch.cat(
            [self(chunk.to(self.taps.device)).cpu() for chunk in pieces_of(states, len(self.visible))]
        )
