"""Steps of vLLM's samplers with a gate in them, without an engine."""

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from router.gate import MarginGate
from router.policy import Terms
from router.reserved import ReservedRows
from server.gate_processor import GateProcessorV2, gate_settings, terms_args
from server.vllm_api import MoveDirectionality, SamplingParams
from tests.helpers import v2_runner

CPU = torch.device("cpu")
ROWS, ESCALATION, BATCH = 14, 10, 6  # of the `reserved` fixture; the size of the largest batch


def engine_config(settings: dict) -> SimpleNamespace:
    return SimpleNamespace(additional_config=settings, scheduler_config=SimpleNamespace(max_num_seqs=BATCH))


def margins(*gaps: float) -> Tensor:
    """(B, V) logits whose margin score is minus the gap; the taps are the largest of all."""
    logits = torch.zeros(len(gaps), ROWS)
    logits[:, 3] = torch.tensor(gaps)
    logits[:, 10:] = 77.0
    return logits


def asks(logits: Tensor) -> list[bool]:
    """For each row, whether only the escalation token is left; the other rows must have lost it."""
    assert (logits[:, ESCALATION + 1 :] == -math.inf).all()
    alone = (logits == -math.inf).sum(-1) == ROWS - 1
    assert (alone == (logits[:, ESCALATION] == 0.0)).all()
    return alone.tolist()


def params(price: float | None = None, not_before: int = 0) -> SamplingParams:
    return SamplingParams(extra_args=None if price is None else terms_args(Terms(price, not_before)))


def update(
    removed: list[int] = [],  # noqa: B006
    added: list[tuple[int, SamplingParams, list[int]]] = [],  # noqa: B006
    moved: list[tuple[int, int, MoveDirectionality]] = [],  # noqa: B006
) -> SimpleNamespace:
    """vLLM's BatchUpdate; an added request is (row, params, its growing output ids)."""
    return SimpleNamespace(
        removed=removed, added=[(row, p, [1], output) for row, p, output in added], moved=moved
    )


def spare(price: float, not_before: int, spare_price: float, spare_from: int) -> SamplingParams:
    return SamplingParams(extra_args=terms_args(Terms(price, not_before, spare_price, spare_from)))


class CountingGate(MarginGate):
    """A margin gate that counts the rows that it scores."""

    seen = 0

    def forward(self, logits: Tensor) -> Tensor:
        self.seen += len(logits)
        return super().forward(logits)


class V2:
    """A processor in vLLM's V2 sampler with four slots, whose prompts have 3, 5, 7 and 9 tokens."""

    def __init__(self, reserved: ReservedRows, visible: int | None = None) -> None:
        states = v2_runner.request_states([3, 5, 7, 9], ROWS)
        settings = gate_settings(reserved, "margin", None, visible)
        self.processor = GateProcessorV2(engine_config(settings), states)
        self.processor.device_terms = self.processor.terms.clone()  # two tensors, as on a GPU
        self.processor.gate = CountingGate(reserved)
        self.sampler = v2_runner.sampler_with(self.processor, 4)

    def add(self, slot: int, sampling_params: SamplingParams) -> None:
        self.sampler.needs_logits_processing[slot] = self.processor.add_request(slot, sampling_params)

    def logits(self, slots: list[int], pos: list[int]) -> Tensor:
        """The logits that vLLM samples from, at a margin of 2."""
        self.processor.apply_staged_writes()
        step = v2_runner.context(slots, pos)
        return self.sampler.apply_sampling_params(
            margins(*[2.0] * len(slots)),
            step.expanded_idx_mapping,
            step.idx_mapping,
            step.idx_mapping_np,
            step.pos,
            step.input_ids,
            step.expanded_local_pos,
            step.seq_lens_upper_bound_np,
        )

    def step(self, slots: list[int], pos: list[int]) -> list[bool]:
        return asks(self.logits(slots, pos))
