"""Time of a gate in a step, relative to one `log_softmax` over the same logits, on one CPU thread."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import NamedTuple

import torch

from measuring.pair import Pair
from router.checkpoint import RouterCheckpoint
from router.gate import GATES, Gate
from router.gate_names import UNTRAINED_GATE
from router.reserved import ReservedRows
from router.rows import vocabulary_rows
from server.bench.plan import Plan
from server.bench.results import Row, Section, Table, Value
from server.gate_processor import decide

ROWS = (1, 32, 256)
VOCABULARIES = (49_184, 128_288, 151_936)
"""Vocabulary sizes of SmolLM2, Llama 3 and Qwen 3, with reserved rows."""
QUICK_ROWS = (1, 32)
QUICK_VOCABULARIES = (49_184, 151_936)
UNIT = "log_softmax"
ANEW = "anew"

Work = Callable[[torch.Tensor], object]
Times = dict[str, list[float]]
"""CPU seconds of every turn, by what was timed."""


class Effort(NamedTuple):
    """How long each pair of rows and vocabulary is measured: at least this many turns and seconds."""

    turns: int
    seconds: float


FULL = Effort(10, 0.5)
QUICK = Effort(4, 0.1)


def run(plan: Plan) -> Section:
    """Every gate's decision over random logits, all rows asking; nothing else of the plan is used."""
    effort = QUICK if plan.quick else FULL
    least: list[Row] = []
    middle: list[Row] = []
    with _one_thread(), torch.inference_mode():
        torch.manual_seed(0)
        for size in QUICK_VOCABULARIES if plan.quick else VOCABULARIES:
            for count in QUICK_ROWS if plan.quick else ROWS:
                times = _times(count, size, effort)
                least.append(_row(count, size, {name: min(found) for name, found in times.items()}))
                middle.append(_row(count, size, {name: median(found) for name, found in times.items()}))
    about = (
        f"CPU time of one thread, as a multiple of one `{UNIT}` that writes to memory that it has already. "
        f"*{ANEW}*: the same to new memory. `amax` only reads the logits. A gate scores all rows and "
        f"decides. In turns, at least {effort.turns} of them and {effort.seconds:g} s."
    )
    return Section(
        {
            "gates": Table("What a gate takes of a step, least times", least, about),
            "medians": Table("The same by medians", middle),
        }
    )


def seconds(pair: Pair, rows: int, turns: int = 20) -> float:
    """Median CPU seconds in which a pair's own gate decides for ``rows`` requests, on one thread."""
    gate = _gate(pair)
    price = torch.full((rows,), 1e9)
    found: list[float] = []
    with _one_thread(), torch.inference_mode():
        logits = torch.randn(rows, gate.reserved.end)
        for _ in range(turns):
            found.append(_timed(partial(decide, gate, price=price), logits))
    return median(found)


def _gate(pair: Pair) -> Gate:
    """The gate of the pair's router; without a router, the gateway's default gate."""
    if pair.router is not None:
        return RouterCheckpoint.load(pair.router).build_gate().freeze()
    return GATES[UNTRAINED_GATE](ReservedRows(vocabulary_rows(pair.student))).freeze()


def _timed(work: Work, logits: torch.Tensor) -> float:
    own = logits.clone()  # `decide` changes it
    start = time.process_time()
    work(own)
    return time.process_time() - start


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _works(logits: torch.Tensor) -> dict[str, Work]:
    """Functions to time, by name, for logits of this shape."""
    reserved = ReservedRows(logits.shape[-1] - 32)
    price = torch.full(logits.shape[:-1], 1e9)
    works: dict[str, Work] = {
        UNIT: partial(torch.log_softmax, dim=-1, out=torch.empty_like(logits)),
        ANEW: partial(torch.log_softmax, dim=-1),
        "amax": partial(torch.amax, dim=-1),
    }
    for name, gate in GATES.items():
        works[name] = partial(decide, gate(reserved).freeze(), price=price)
    return works


def _times(count: int, size: int, effort: Effort) -> Times:
    """Time every function in turns, each in another order, so that none always comes after the same one."""
    logits = torch.randn(count, size) * 3
    works = list(_works(logits).items())
    times: Times = {name: [] for name, _ in works}
    order = random.Random(0)
    spent = 0.0
    while len(times[UNIT]) < effort.turns or spent < effort.seconds:
        for name, work in order.sample(works, len(works)):
            times[name].append(_timed(work, logits))
            spent += times[name][-1]
    return times


def _row(count: int, size: int, found: dict[str, float]) -> Row:
    row: dict[str, Value] = {"rows": count, "vocabulary": size, f"{UNIT}, ms": 1000 * found[UNIT]}
    for name, seconds in found.items():
        if name != UNIT:
            row[name] = seconds / found[UNIT]
    return row
