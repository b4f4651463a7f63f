"""The gate inside the student's engine, as a vLLM logits processor.

Two thin adapters over one decision (`decide`): vLLM's V1 interface (CPU, and GPU with the V1
runner) and its V2 interface. Both run in the engine's process. A request brings its terms in
``SamplingParams.extra_args``; one without terms never asks. The reserved rows are masked for every
request, whatever its terms.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from router.checkpoint import RouterCheckpoint
from router.gate import GATES, Gate
from router.policy import Terms
from router.reserved import ReservedRows
from server.vllm_api import LogitsProcessor, LogitsProcessorV2, MoveDirectionality, Sampler, SamplingParams

SETTINGS = "wheels"
PRICE = "wheels_price"
NOT_BEFORE = "wheels_not_before"


def gate_settings(reserved: ReservedRows, gate: str, router: Path | None) -> dict[str, Any]:
    """The engine's ``additional_config`` from which its process builds the gate."""
    return {
        SETTINGS: {
            "reserved": [reserved.start, reserved.count],
            "gate": gate,
            "router": None if router is None else str(router),
        }
    }


def terms_args(terms: Terms) -> dict[str, float | int]:
    """The ``extra_args`` that carry a segment's terms to the engine's process."""
    return {PRICE: terms.price, NOT_BEFORE: terms.not_before}


def decide(gate: Gate, logits: Tensor, price: Tensor) -> None:
    """Force the escalation token where the gate's score exceeds the price, mask the reserved rows.

    logits: (B, V) float32, changed in place; price: (B,) float32, inf where asking is forbidden.
    """
    ask = gate(logits) > price
    mask_reserved(logits, gate.reserved)
    logits.masked_fill_(ask[:, None], -math.inf)
    logits[:, gate.reserved.escalation].masked_fill_(ask, 0.0)


def mask_reserved(logits: Tensor, reserved: ReservedRows) -> None:
    """logits: (..., V), changed in place."""
    logits[..., reserved.start : reserved.end] = -math.inf


def build_gate(vllm_config: Any, device: torch.device) -> Gate:
    settings = vllm_config.additional_config[SETTINGS]
    reserved = ReservedRows(*settings["reserved"])
    if settings["router"] is None:
        gate = GATES[settings["gate"]](reserved)
    else:
        gate = RouterCheckpoint.load(Path(settings["router"])).build_gate(settings["gate"])
    _hide_reserved_rows_from_logprobs(reserved)
    return gate.to(device)


def _hide_reserved_rows_from_logprobs(reserved: ReservedRows) -> None:
    """vLLM computes reported log-probabilities before any processor runs, and has no hook there."""
    original = Sampler.compute_logprobs
    if hasattr(original, "reserved"):
        return

    def compute_logprobs(logits: Tensor) -> Tensor:
        logits = logits.clone()
        mask_reserved(logits, reserved)
        return original(logits)

    compute_logprobs.reserved = reserved
    Sampler.compute_logprobs = staticmethod(compute_logprobs)


class GateProcessor(LogitsProcessor):
    """V1 interface: batch rows are requests, in the order of the persistent batch."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.gate = build_gate(vllm_config, device)
        rows = vllm_config.scheduler_config.max_num_seqs
        self.prices = torch.full((rows,), math.inf)
        self.device_prices = self.prices.to(device)
        self.finite: set[int] = set()
        # row -> (price, not_before, the request's growing output ids): not allowed to ask yet
        self.waiting: dict[int, tuple[float, int, list[int]]] = {}
        self.changed = False

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        if batch_update is not None:
            for row in batch_update.removed:
                self._set(row, math.inf)
            for row, params, _, output_ids in batch_update.added:
                args = params.extra_args or {}
                price, not_before = args.get(PRICE, math.inf), args.get(NOT_BEFORE, 0)
                if not_before > len(output_ids):
                    self._set(row, math.inf)
                    self.waiting[row] = (price, not_before, output_ids)
                else:
                    self._set(row, price)
            for first, second, direction in batch_update.moved:
                self._move(first, second, swap=direction == MoveDirectionality.SWAP)
        due = [
            row for row, (_, not_before, output_ids) in self.waiting.items() if len(output_ids) >= not_before
        ]
        for row in due:
            self._set(row, self.waiting[row][0])

    def _set(self, row: int, price: float) -> None:
        self.waiting.pop(row, None)
        if price == math.inf and row not in self.finite:
            return
        (self.finite.discard if price == math.inf else self.finite.add)(row)
        self.prices[row] = price
        self.changed = True

    def _move(self, first: int, second: int, swap: bool) -> None:
        """State of row ``first`` goes to ``second``, and back where they swap."""
        first_price, first_waiting = self.prices[first].item(), self.waiting.get(first)
        second_price, second_waiting = self.prices[second].item(), self.waiting.get(second)
        self._restore(second, first_price, first_waiting)
        self._restore(first, second_price if swap else math.inf, second_waiting if swap else None)

    def _restore(self, row: int, price: float, waiting: tuple[float, int, list[int]] | None) -> None:
        self._set(row, price)
        if waiting is not None:
            self.waiting[row] = waiting

    def apply(self, logits: Tensor) -> Tensor:
        if not self.finite:
            mask_reserved(logits, self.gate.reserved)
            return logits
        if self.changed:
            self.device_prices.copy_(self.prices, non_blocking=True)
            self.changed = False
        decide(self.gate, logits, self.device_prices[: logits.shape[0]])
        return logits


class GateProcessorV2(LogitsProcessorV2):
    """V2 interface: rows are mapped to request slots at every step."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self.req_states = req_states
        self.gate = build_gate(vllm_config, req_states.device)
        self.terms = torch.zeros(2, req_states.max_num_reqs)  # (price, not_before)
        self.device_terms = self.terms.to(req_states.device)
        self.changed = False

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        args = sampling_params.extra_args or {}
        self.terms[0, req_idx] = args.get(PRICE, math.inf)
        self.terms[1, req_idx] = args.get(NOT_BEFORE, 0)
        self.changed = True
        return True

    def apply_staged_writes(self) -> None:
        if self.changed:
            self.device_terms.copy_(self.terms, non_blocking=True)
            self.changed = False

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        slots = ctx.expanded_idx_mapping
        price, not_before = self.device_terms[:, slots]
        written = ctx.pos + 1 - self.req_states.prompt_len.gpu[slots]
        decide(self.gate, logits, torch.where(written < not_before, math.inf, price))
        return logits
