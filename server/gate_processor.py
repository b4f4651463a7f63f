"""The gate inside the student's engine, as a vLLM logits processor.

Two thin adapters over one decision (`decide`): vLLM's V1 interface (CPU, and GPU with the V1
runner) and its V2 interface. Both run in the engine's process. A request brings its terms in
``SamplingParams.extra_args``; one without terms never asks. The reserved rows are masked for every
request, whatever its terms.
"""

import math
from pathlib import Path
from typing import Any
from weakref import WeakSet

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
SPARE_PRICE = "wheels_spare_price"
SPARE_FROM = "wheels_spare_from"
TERMS = frozenset({PRICE, NOT_BEFORE, SPARE_PRICE, SPARE_FROM})
"""What a client must not say: it would steer the router."""


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
    args: dict[str, float | int] = {PRICE: terms.price, NOT_BEFORE: terms.not_before}
    if terms.spare_price is not None:
        args |= {SPARE_PRICE: terms.spare_price, SPARE_FROM: terms.spare_from}
    return args


def price_steps(args: dict[str, Any]) -> list[tuple[float, float]]:
    """(from that many tokens of the segment on, price), in order; never (inf) before the first."""
    steps = [(args.get(NOT_BEFORE, 0), args.get(PRICE, math.inf))]
    if SPARE_PRICE in args:
        steps.append((args[SPARE_FROM], args[SPARE_PRICE]))
    return steps


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


class RouterLoader:
    """What vLLM's worker can do besides (its ``worker_extension_cls``)."""

    def load_router(self, directory: str) -> None:
        """Take taps and gate from a router checkpoint for this student, between two steps."""
        router = RouterCheckpoint.load(Path(directory))
        settings = self.vllm_config.additional_config[SETTINGS]
        gate = router.build_gate(settings["gate"])
        write_taps(self.get_model().lm_head, router)
        for processor in PROCESSORS:
            processor.gate = gate.to(processor.device)


PROCESSORS: "WeakSet[GateProcessor | GateProcessorV2]" = WeakSet()
"""This process's: one, or none where it only serves HTTP."""


def write_taps(output: Any, router: RouterCheckpoint) -> None:
    """``output``: vLLM's output matrix, of which this process may have only some rows (tensor parallel)."""
    rows, taps = output.shard_indices, router.reserved.taps
    first, end = rows.org_vocab_start_index, rows.org_vocab_end_index
    mine = range(max(taps.start, first), min(taps.stop, end))
    if mine:
        values = router.taps[mine.start - taps.start : mine.stop - taps.start]
        output.weight.data[mine.start - first : mine.stop - first] = values.to(output.weight)
    if hasattr(output, "cpu_linear"):  # which may hold a copy, packed for the CPU's kernels
        output.quant_method.process_weights_after_loading(output)


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


Waiting = tuple[list[tuple[float, float]], list[int]]
"""The price steps still to come, and the request's growing output ids."""


class GateProcessor(LogitsProcessor):
    """V1 interface: batch rows are requests, in the order of the persistent batch."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.device = device
        self.gate = build_gate(vllm_config, device)
        PROCESSORS.add(self)
        rows = vllm_config.scheduler_config.max_num_seqs
        self.prices = torch.full((rows,), math.inf)
        self.device_prices = self.prices.to(device)
        self.finite: set[int] = set()
        self.waiting: dict[int, Waiting] = {}  # by row
        self.changed = False

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        if batch_update is not None:
            for row in batch_update.removed:
                self._set(row, math.inf)
            for row, params, _, output_ids in batch_update.added:
                self._set(row, math.inf)
                self._advance(row, price_steps(params.extra_args or {}), output_ids)
            for first, second, direction in batch_update.moved:
                self._move(first, second, swap=direction == MoveDirectionality.SWAP)
        for row, (steps, output_ids) in list(self.waiting.items()):
            if steps[0][0] <= len(output_ids):
                self._advance(row, steps, output_ids)

    def _advance(self, row: int, steps: list[tuple[float, float]], output_ids: list[int]) -> None:
        """Set the price of the last step that has come; the others wait."""
        due = [price for start, price in steps if start <= len(output_ids)]
        if due:
            self._set(row, due[-1])
        if len(due) < len(steps):
            self.waiting[row] = (steps[len(due) :], output_ids)

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

    def _restore(
        self, row: int, price: float, waiting: tuple[list[tuple[float, float]], list[int]] | None
    ) -> None:
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
        self.device = req_states.device
        self.gate = build_gate(vllm_config, self.device)
        PROCESSORS.add(self)
        # two steps (from, price) of every slot
        self.terms = torch.zeros(2, 2, req_states.max_num_reqs)
        self.device_terms = self.terms.to(req_states.device)
        self.changed = False

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        first, second = [*price_steps(sampling_params.extra_args or {}), (math.inf, math.inf)][:2]
        self.terms[:, :, req_idx] = torch.tensor([first, second])
        self.changed = True
        return True

    def apply_staged_writes(self) -> None:
        if self.changed:
            self.device_terms.copy_(self.terms, non_blocking=True)
            self.changed = False

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        slots = ctx.expanded_idx_mapping
        written = ctx.pos + 1 - self.req_states.prompt_len.gpu[slots]
        price = torch.full_like(written, math.inf, dtype=torch.float32)
        for start, from_then in self.device_terms[:, :, slots]:
            price = torch.where(written >= start, from_then, price)
        decide(self.gate, logits, price)
        return logits
