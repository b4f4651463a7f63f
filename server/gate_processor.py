"""The gate inside the student's engine, as a vLLM logits processor.

Two thin adapters over one decision (`decide`): vLLM's V1 interface (CPU, and GPU with the V1
runner) and its V2 interface. Both run in the engine's process. A request brings its terms in
``SamplingParams.extra_args``; one without terms never asks. The reserved rows are masked for every
request, whatever its terms.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from router.checkpoint import RouterCheckpoint
from router.gate import GATES, Gate, TeachersGate
from router.policy import Terms
from router.reserved import ReservedRows
from router.sketch import ScoreSketch
from server.vllm_api import (
    LogitsProcessor,
    LogitsProcessorV2,
    MoveDirectionality,
    SamplingParams,
    count_from,
    hide_from_reports,
    keep_from_adapters,
    prompt_lengths,
)
from server.written import GRAMMAR_FROM, WRITTEN, WrittenInRows, WrittenInSlots

SETTINGS = "wheels"
PRICE = "wheels_price"
NOT_BEFORE = "wheels_not_before"
SPARE_PRICE = "wheels_spare_price"
SPARE_FROM = "wheels_spare_from"
DEARER = "wheels_dearer"
LEAST = "wheels_least"
TERMS = frozenset({PRICE, NOT_BEFORE, SPARE_PRICE, SPARE_FROM, DEARER, LEAST, WRITTEN, GRAMMAR_FROM})
"""Names in ``extra_args`` that clients must not use: the span loop sends them to the engine."""

PIECE_ON_CPU = 2**20
"""Number of logits that a gate reads at a time on a CPU: 4 MiB in float32."""
PIECE_ON_GPU = 2**26
"""Number of logits that a gate reads at a time on a GPU: 256 MiB in float32."""
MANY = 0.5
"""If more than this share of a batch may ask, the gate reads all rows in place, and copies none."""


def gate_settings(
    reserved: ReservedRows,
    gate: str,
    router: Path | None,
    visible: int | None = None,
    *,
    sketch: bool = False,
    teachers: int = 1,
) -> dict[str, Any]:
    """The engine's ``additional_config`` from which its process builds the gate.

    Args:
        reserved: the rows of escalation token and taps.
        gate: a name of `router.gate.GATES`.
        router: directory of the router checkpoint; None for a gate without training.
        visible: see `router.reserved.visible_rows`; default: all rows before the reserved ones.
        sketch: whether to keep the scores, from which prices are learned.
        teachers: number of teachers, each with a price of its own.
    """
    settings: dict[str, Any] = {
        "reserved": [reserved.start, reserved.count],
        "gate": gate,
        "router": None if router is None else str(router),
    }
    if sketch:
        settings["sketch"] = True
    if teachers > 1:
        settings["teachers"] = teachers
    if visible is not None:
        settings["visible"] = visible
    return {SETTINGS: settings}


def visible_rows_of(additional_config: Any) -> int:
    """The first row that is no token, by the engine's ``additional_config``."""
    settings = additional_config[SETTINGS]
    return int(settings.get("visible", settings["reserved"][0]))


def terms_args(terms: Terms) -> dict[str, Any]:
    """The ``extra_args`` that carry a segment's terms to the engine's process."""
    args: dict[str, Any] = {PRICE: terms.price, NOT_BEFORE: terms.not_before}
    if terms.spare_price is not None:
        args |= {SPARE_PRICE: terms.spare_price, SPARE_FROM: terms.spare_from}
    if terms.dearer:
        args[DEARER] = list(terms.dearer)
    if terms.least:
        args[LEAST] = [least.price for least in terms.least]
    return args


def price_steps(args: dict[str, Any]) -> list[tuple[float, float]]:
    """Steps (start, price) in order: a price applies from ``start`` tokens of the segment on; before, inf."""
    steps = [(args.get(NOT_BEFORE, 0), args.get(PRICE, math.inf))]
    if SPARE_PRICE in args:
        steps.append((args[SPARE_FROM], args[SPARE_PRICE]))
    return steps


def decide(
    gate: Gate,
    logits: Tensor,
    price: Tensor,
    rows: Tensor | None = None,
    visible: int | None = None,
    others: Tensor | None = None,
) -> Tensor:
    """Force the escalation token in rows whose score exceeds the price; mask the rows that are no tokens.

    With several teachers, one of the rows from the escalation token on is forced. A gate with one score takes
    the row by how many of the dearer prices it exceeds. A gate with an output for each teacher takes the row
    of the largest margin.

    Args:
        gate: the gate that decides.
        logits: (B, V) float32, changed in place.
        price: (B,) float32, inf for a row that may not ask.
        rows: (R,) int64, indices of the rows to score; None for all B.
        visible: as in `mask_reserved`.
        others: (B, teachers) float32, see `other_prices`; None with one teacher.

    Returns:
        The scores of ``rows``, (R,).
    """
    if rows is not None:
        price = price[rows]
        others = None if others is None else others[rows]
    asked = ask_each(gate, logits, price, rows, others)
    mask_reserved(logits, gate.reserved, visible)
    ask, levels = asked.ask, asked.levels
    if not logits.is_cpu:
        force(logits, gate.reserved.escalation, ask, rows, levels)
    elif ask.any():  # on a CPU, nothing waits for this result
        asking = ask.nonzero().squeeze(-1) if rows is None else rows[ask]
        logits.index_fill_(0, asking, -math.inf)
        logits[asking, gate.reserved.escalation + (0 if levels is None else levels[ask])] = 0.0
    return asked.scored


class Asked(NamedTuple):
    """A gate's decisions for R rows."""

    scored: Tensor
    """(R,) scores of the gate."""
    ask: Tensor
    """(R,) bool: whether the row asks."""
    levels: Tensor | None
    """(R,) offset from the escalation token of the row to force, for rows that ask; None: always 0."""


def ask_each(gate: Gate, logits: Tensor, price: Tensor, rows: Tensor | None, others: Tensor | None) -> Asked:
    """A gate's decisions. Arguments as in `decide`, but ``price`` and ``others`` only have ``rows``."""
    if isinstance(gate, TeachersGate):
        worth = in_pieces(gate.worth, logits, rows)
        return ask_by_worth(gate, worth, price, others)
    scored = in_pieces(gate.forward, logits, rows)
    levels = None if others is None else (scored[:, None] > others[:, :-1]).sum(1)
    return Asked(scored, scored > price, levels)


def ask_by_worth(gate: TeachersGate, worth: Tensor, price: Tensor, least: Tensor | None) -> Asked:
    """Which rows ask, and which teacher, by each teacher's worth; shapes as in `TeachersGate.margins`."""
    scored = gate.common(worth)
    if least is None:
        return Asked(scored, scored > price, gate.margins(worth, price).argmax(-1))
    unknown = least.isnan()
    least = least.masked_fill(unknown, -math.inf)
    ask = gate.margins(worth, price, least).amax(-1) > 0
    # At a price of -inf every margin is inf: the largest worth decides then.
    finite = torch.maximum(gate.prices(price), least)
    best = (worth - finite.masked_fill(finite == -math.inf, 0.0)).argmax(-1)
    return Asked(scored, ask, best.masked_fill(unknown.any(-1), 0))


def force(
    logits: Tensor, escalation: int, ask: Tensor, rows: Tensor | None = None, levels: Tensor | None = None
) -> None:
    """Leave nothing but the escalation token to rows that ask, without a wait for the device.

    Arguments as in `decide` and `Asked`; ``ask`` and ``levels`` only have ``rows``. All reserved rows are
    masked already.
    """
    if rows is not None:
        ask = torch.zeros_like(logits[:, 0], dtype=torch.bool).index_copy_(0, rows, ask)
    logits.masked_fill_(ask[:, None], -math.inf)
    if levels is None:
        logits[:, escalation].masked_fill_(ask, 0.0)
        return
    if rows is not None:
        levels = torch.zeros_like(ask, dtype=levels.dtype).index_copy_(0, rows, levels)
    forced = torch.where(ask, 0.0, -math.inf).to(logits)
    logits.scatter_(1, (escalation + levels)[:, None], forced[:, None])


def in_pieces(read: Callable[[Tensor], Tensor], logits: Tensor, rows: Tensor | None = None) -> Tensor:
    """What ``read`` returns for these rows (default: all), computed piece by piece.

    On a GPU, a gate makes tensors as large as what it reads, and a selection of rows is a copy. Pieces keep
    these tensors small: they fit into a CPU's caches, and into the GPU memory that vLLM leaves free.
    """
    if rows is None and logits.is_cpu and logits.is_contiguous():  # nothing is copied
        return read(logits)
    size = max(1, (PIECE_ON_CPU if logits.is_cpu else PIECE_ON_GPU) // logits.shape[-1])
    if rows is None:
        return torch.cat([read(piece) for piece in torch.split(logits, size)])
    return torch.cat([read(logits[piece]) for piece in torch.split(rows, size)])


def mask_reserved(logits: Tensor, reserved: ReservedRows, visible: int | None = None) -> None:
    """Set the reserved rows of ``logits``, (..., V), to -inf in place.

    ``visible``: the first row to mask, if rows before the reserved ones are no tokens either.
    """
    start = reserved.start if visible is None else visible
    logits[..., start : reserved.end] = -math.inf


class Decider:
    """Shared by both interfaces: the gate of this process, and the rows that are no tokens."""

    gate: Gate
    device: torch.device
    sketch: ScoreSketch | None
    """The scores that were seen, if prices are learned from them; else None."""

    def _build(self, vllm_config: Any, *, v2: bool) -> None:
        settings = vllm_config.additional_config[SETTINGS]
        reserved = ReservedRows(*settings["reserved"])
        if settings["router"] is None:
            gate = GATES[settings["gate"]](reserved)
        else:
            gate = RouterCheckpoint.load(Path(settings["router"])).build_gate(settings["gate"])
        self.take(gate)
        self.visible = visible_rows_of(vllm_config.additional_config)
        self.teachers: int = settings.get("teachers", 1)
        self.sketch = ScoreSketch(self.device) if settings.get("sketch") else None
        hide_from_reports(slice(self.visible, reserved.end), v2=v2)
        keep_from_adapters(slice(reserved.start, reserved.end))
        PROCESSORS.add(self)

    def take(self, gate: Gate) -> None:
        """Decide by this gate from now on."""
        self.gate = gate.to(self.device).freeze()
        self.gate(torch.zeros(1, gate.reserved.end, device=self.device))  # the first call compiles the gate

    def _mask(self, logits: Tensor) -> Tensor:
        mask_reserved(logits, self.gate.reserved, self.visible)
        return logits

    def _new_others(self, rows: int) -> Tensor | None:
        """A table for the `other_prices` of every request, (rows, teachers); None with one teacher."""
        return torch.full((rows, self.teachers), math.nan) if self.teachers > 1 else None

    def _decide(
        self, logits: Tensor, price: Tensor, rows: Tensor | None, others: Tensor | None = None
    ) -> Tensor:
        scored = decide(self.gate, logits, price, rows, self.visible, others)
        if self.sketch is not None:
            forbidden = (price if rows is None else price[rows]) == math.inf
            self.sketch.add(scored.masked_fill(forbidden, math.nan))
        return logits


PROCESSORS: "WeakSet[Decider]" = WeakSet()
"""Processors of this process: one, or none if it only serves HTTP."""


Waiting = tuple[list[tuple[float, float]], list[int]]
"""The price steps of a request that are still to come, and its growing output ids."""


class GateProcessor(Decider, LogitsProcessor):
    """V1 interface: batch rows are requests, in the order of the persistent batch."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.device = device
        self._build(vllm_config, v2=False)
        self.written = WrittenInRows()
        count_from(self.written.outputs, v2=False)
        rows = vllm_config.scheduler_config.max_num_seqs
        self.prices = torch.full((rows,), math.inf)
        self.device_prices = self.prices.to(device)
        self.others = self._new_others(rows)
        self.device_others = None if self.others is None else self.others.to(device)
        self.finite: set[int] = set()
        self.waiting: dict[int, Waiting] = {}  # by row
        self.changed = False
        self.batch = 0
        self.asking: list[int] = []  # rows of the batch with a finite price
        self.rows: Tensor | None = None

    def is_argmax_invariant(self) -> bool:
        """False: the mask changes what greedy decoding picks."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the requests that came, left and moved in the batch."""
        if batch_update is not None:
            for row in batch_update.removed:
                self._set(row, math.inf)
                self.written.drop(row)
            for row, params, prompt_ids, output_ids in batch_update.added:
                self._set(row, math.inf)
                self.written.set(row, params, prompt_ids)
                self._advance(row, price_steps(params.extra_args or {}), output_ids)
                if self.others is not None:
                    self.others[row] = other_prices(params, self.teachers)
            for first, second, direction in batch_update.moved:
                swap = direction == MoveDirectionality.SWAP
                self._move(first, second, swap=swap)
                self.written.move(first, second, swap=swap)
        for row, (steps, output_ids) in list(self.waiting.items()):
            if steps[0][0] <= len(output_ids):
                self._advance(row, steps, output_ids)

    def _advance(self, row: int, steps: list[tuple[float, float]], output_ids: list[int]) -> None:
        """Set the price of the last step that is due; later steps wait."""
        due = [price for start, price in steps if start <= len(output_ids)]
        if due:
            self._set(row, due[-1])
        if len(due) < len(steps):
            self.waiting[row] = (steps[len(due) :], output_ids)

    def _set(self, row: int, price: float) -> None:
        self.waiting.pop(row, None)
        if price == math.inf and row not in self.finite:
            return
        if price == math.inf:
            self.finite.discard(row)
        else:
            self.finite.add(row)
        self.prices[row] = price
        self.changed = True

    def _move(self, first: int, second: int, swap: bool) -> None:
        """Move the state of row ``first`` to ``second``, and the other way round too if they swap."""
        first_price = self.prices[first].item()
        first_waiting = self.waiting.get(first)
        second_price = self.prices[second].item()
        second_waiting = self.waiting.get(second)
        self._restore(second, first_price, first_waiting)
        if self.others is not None:  # without a swap, the first row has no price then
            self.others[[first, second]] = self.others[[second, first]]
        if swap:
            self._restore(first, second_price, second_waiting)
        else:
            self._restore(first, math.inf, None)

    def _restore(
        self, row: int, price: float, waiting: tuple[list[tuple[float, float]], list[int]] | None
    ) -> None:
        self._set(row, price)
        if waiting is not None:
            self.waiting[row] = waiting

    def apply(self, logits: Tensor) -> Tensor:
        """Mask the rows of requests that may not ask, and score the others."""
        batch = len(logits)
        if self.changed or batch != self.batch:
            self.batch = batch
            self.asking = [row for row in sorted(self.finite) if row < batch]
            self.rows = rows_to_read(self.asking, batch, self.device)
        if not self.asking:
            return self._mask(logits)
        if self.changed:
            self.device_prices.copy_(self.prices, non_blocking=True)
            if self.others is not None and self.device_others is not None:
                self.device_others.copy_(self.others, non_blocking=True)
            self.changed = False
        others = None if self.device_others is None else self.device_others[:batch]
        return self._decide(logits, self.device_prices[:batch], self.rows, others)


def other_prices(params: SamplingParams, count: int) -> Tensor:
    """A request's prices in addition to the first, (count,); NaN for missing ones.

    For a gate with one output, these are the prices of the dearer teachers. For a gate with an output for
    each teacher, they are `router.policy.Terms.least`.
    """
    args = params.extra_args or {}
    prices = args.get(LEAST) or args.get(DEARER, ())
    return torch.tensor([*prices, *[math.nan] * count][:count])


def rows_to_read(asking: Sequence[int], batch: int, device: torch.device) -> Tensor | None:
    """Indices of the rows that a gate has to score; None for all, if too many would have to be copied."""
    if len(asking) > MANY * batch:
        return None
    return torch.tensor(asking, dtype=torch.int64).to(device, non_blocking=True)


NEVER_ASKS = 2**62


class GateProcessorV2(Decider, LogitsProcessorV2):
    """V2 interface: rows are mapped to request slots at every step."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self.req_states = req_states
        self.device = req_states.device
        self._build(vllm_config, v2=True)
        self.written = WrittenInSlots(req_states.max_num_reqs, req_states.device)
        count_from(self.written.prompt_lengths, v2=True)
        # (2, 2, slots): two price steps of every slot, each with its start and its price
        self.terms = torch.zeros(2, 2, req_states.max_num_reqs)
        self.device_terms = self.terms.to(req_states.device)
        self.others = self._new_others(req_states.max_num_reqs)
        self.device_others = None if self.others is None else self.others.to(req_states.device)
        self.changed = False
        self.asks_from = np.full(req_states.max_num_reqs, NEVER_ASKS, dtype=np.int64)
        """(slots,) tokens of the segment from which its request may ask; on the host, to avoid a wait."""

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Note the terms of a request in its slot; returns True, because the gate is for every request."""
        steps = price_steps(sampling_params.extra_args or {})
        first, second = [*steps, (math.inf, math.inf)][:2]
        self.terms[:, :, req_idx] = torch.tensor([first, second])
        self.asks_from[req_idx] = min(
            (start for start, price in steps if price < math.inf), default=NEVER_ASKS
        )
        if self.others is not None:
            self.others[req_idx] = other_prices(sampling_params, self.teachers)
        self.changed = True
        self.written.set(req_idx, sampling_params)
        return True

    def apply_staged_writes(self) -> None:
        """Copy changed terms to the device."""
        if self.changed:
            self.device_terms.copy_(self.terms, non_blocking=True)
            if self.others is not None and self.device_others is not None:
                self.device_others.copy_(self.others, non_blocking=True)
            self.changed = False

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Mask the rows of requests that may not ask, and score the others."""
        prompts = prompt_lengths(self.req_states)
        requests = ctx.idx_mapping_np
        at_most_written = ctx.seq_lens_upper_bound_np - prompts.host[requests]
        asking = np.flatnonzero(at_most_written >= self.asks_from[requests])
        if not asking.size:
            return self._mask(logits)
        slots = ctx.expanded_idx_mapping
        written = ctx.pos + 1 - prompts.device[slots]
        price = torch.full_like(written, math.inf, dtype=torch.float32)
        for start, from_then in self.device_terms[:, :, slots]:
            price = torch.where(written >= start, from_then, price)
        rows = None
        if len(requests) == len(logits):  # no drafts: a row is a request
            rows = rows_to_read(asking.tolist(), len(logits), self.device)
        others = None if self.device_others is None else self.device_others[slots]
        return self._decide(logits, price, rows, others)
