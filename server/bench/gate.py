"""What a gate takes of a step, as a multiple of one `log_softmax` over the same logits, on one CPU thread."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median

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
"""Of SmolLM2, Llama 3 and Qwen 3, with reserved rows."""
QUICK_ROWS = (1, 32)
QUICK_VOCABULARIES = (49_184, 151_936)
TURNS = 10
QUICK_TURNS = 4
UNIT = "log_softmax"

Work = Callable[[torch.Tensor], object]


def run(plan: Plan) -> Section:
    """Every gate's decision over random logits, all rows asking; nothing else of the plan is used."""
    turns = QUICK_TURNS if plan.quick else TURNS
    rows: list[Row] = []
    with _one_thread(), torch.inference_mode():
        torch.manual_seed(0)
        for size in QUICK_VOCABULARIES if plan.quick else VOCABULARIES:
            for count in QUICK_ROWS if plan.quick else ROWS:
                rows.append(_row(count, size, _best(count, size, turns)))
    about = (
        f"CPU time of one thread, best of {turns}, in turns. A gate scores all rows and decides. "
        "`log_softmax` makes its result anew; `amax` only reads the logits."
    )
    return Section({"gates": Table("What a gate takes of a step", rows, about)})


def seconds(pair: Pair, rows: int, turns: int = 20) -> float:
    """CPU seconds in which a pair's own gate decides for as many requests, on one thread; the median."""
    gate = _gate(pair)
    price = torch.full((rows,), 1e9)
    found: list[float] = []
    with _one_thread(), torch.inference_mode():
        logits = torch.randn(rows, gate.reserved.end)
        for _ in range(turns):
            found.append(_timed(partial(decide, gate, price=price), logits))
    return median(found)


def _gate(pair: Pair) -> Gate:
    """The pair's router, or what the gateway takes where there is none."""
    if pair.router is not None:
        return RouterCheckpoint.load(pair.router).build_gate().eval()
    return GATES[UNTRAINED_GATE](ReservedRows(vocabulary_rows(pair.student))).eval()


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


def _works(count: int, size: int) -> dict[str, Work]:
    """What is timed, by name, for this many rows of a vocabulary of this size."""
    reserved = ReservedRows(size - 32)
    price = torch.full((count,), 1e9)
    works: dict[str, Work] = {UNIT: partial(torch.log_softmax, dim=-1), "amax": partial(torch.amax, dim=-1)}
    for name, gate in GATES.items():
        works[name] = partial(decide, gate(reserved).eval(), price=price)
    return works


def _best(count: int, size: int, turns: int) -> dict[str, float]:
    """Seconds by name, the least of all turns."""
    logits = torch.randn(count, size) * 3
    works = _works(count, size)
    best: dict[str, float] = {}
    for _ in range(turns):
        for name, work in works.items():
            found = _timed(work, logits)
            best[name] = min(best.get(name, found), found)
    return best


def _row(count: int, size: int, best: dict[str, float]) -> Row:
    row: dict[str, Value] = {"rows": count, "vocabulary": size, f"{UNIT}, ms": 1000 * best[UNIT]}
    for name, found in best.items():
        if name != UNIT:
            row[name] = found / best[UNIT]
    return row
