"""Taps and learned gate of a frozen student, while they are trained."""

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
    """Taps and learned gate of a frozen student; they compute what they will compute when merged into it."""

    visible: Tensor
    """(V, H) the student's output matrix without the reserved rows."""
    bias: Tensor | None
    """(rows,) bias of the output matrix, with the reserved rows; None: it has no bias."""

    def __init__(
        self, student: PreTrainedModel, reserved: ReservedRows, width: int, costs: Sequence[float] = ()
    ) -> None:
        """Make taps of zeros and a new gate.

        Args:
            student: the frozen student.
            reserved: the student's rows for the router.
            width: width of the gate's hidden layers.
            costs: cost of each teacher's token, for a gate with an output for each; empty: one teacher.
        """
        super().__init__()
        self.gate: LearnedGate = new_gate(reserved, width, costs)
        output = student.get_output_embeddings()
        self.taps = nn.Parameter(torch.zeros(reserved.count - 1, output.weight.shape[1]))
        self.register_buffer("visible", output.weight[: reserved.start].detach().clone())
        bias = bias_of(student, reserved.end)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._readout = Readout.of(student.config)

    def start_from(self, states: Tensor, known: Tensor | None = None) -> None:
        """Set the taps to the directions of largest variance of states (N, H), and standardise the features.

        Args:
            states: (N, H), the student's states.
            known: the states' `confidence` (N, 10); None: it is computed.
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
        """The taps and the gate of a checkpoint, frozen, for its student."""
        costs = [teacher.cost for teacher in checkpoint.config.teachers]
        head = cls(student, checkpoint.reserved, checkpoint.config.gate_width, costs)
        head.taps.data.copy_(checkpoint.taps)
        head.gate.load_state_dict(checkpoint.gate)
        return head.requires_grad_(False).eval()

    def install(self, student: PreTrainedModel) -> None:
        """Write the taps into the student's rows in memory, as `RouterCheckpoint.merge` does in its files."""
        student.get_output_embeddings().weight.data[self.gate.reserved.taps] = self.taps.detach()

    def logits(self, states: Tensor) -> Tensor:
        """Logits (N, V) of the merged student for states (N, H). The escalation row's logit is 0."""
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
        """(N, 10) the confidence features of states (N, H), which training does not change.

        They need logits over the whole vocabulary, so they are computed in pieces, and only once.
        """
        features = []
        for chunk in pieces_of(states, len(self.visible)):
            logits = self._visible_logits(chunk.to(self.taps.device))
            features.append(confidence(logits, self.gate.reserved))
        return torch.cat(features)

    def features(self, states: Tensor, confidence: Tensor) -> Tensor:
        """(N, F) the gate's features, as `router.features` computes them from logits."""
        return torch.cat((self._tapped(states), confidence), dim=-1)

    def forward(self, states: Tensor) -> Tensor:
        """The gate's scores (N,) of states (N, H)."""
        return self.gate(self.logits(states))

    @torch.no_grad()
    def scores(self, states: Tensor, known: Tensor | None = None) -> Tensor:
        """The gate's scores (N,) of states (N, H), on the CPU.

        Args:
            states: (N, H), the student's states.
            known: the states' `confidence` (N, 10); None: it is computed, piece by piece.
        """
        if known is not None:
            x = self.features(states.to(self.taps.device), known.to(self.taps.device))
            return self.gate.score(x).cpu()
        return torch.cat(
            [self(chunk.to(self.taps.device)).cpu() for chunk in pieces_of(states, len(self.visible))]
        )
