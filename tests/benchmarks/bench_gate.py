"""What a gate costs at a step, as a multiple of one `log_softmax` over the same rows: CPU time, one thread.

Best of ten, in turns, so that a busy machine slows both alike. `amax` reads the logits once.

    python -m tests.benchmarks.bench_gate
"""

import time
from collections.abc import Callable
from functools import partial

import torch

from router.gate import GATES
from router.reserved import ReservedRows
from server.gate_processor import decide

ROWS = (1, 32, 256)
VOCABULARIES = (49_184, 128_288, 151_936)
TURNS = 10
UNIT = "log_softmax"

Work = Callable[[torch.Tensor], object]


def seconds(work: Work, logits: torch.Tensor) -> float:
    """CPU time; `decide` changes the logits, so it gets logits of its own."""
    own = logits.clone()
    start = time.process_time()
    work(own)
    return time.process_time() - start


def works(rows: int, size: int) -> dict[str, Work]:
    """What is timed, by name, for a vocabulary of this size."""
    reserved = ReservedRows(size - 32)
    price = torch.full((rows,), 1e9)
    found: dict[str, Work] = {
        "amax": partial(torch.amax, dim=-1),
        UNIT: partial(torch.log_softmax, dim=-1),
    }
    for name, gate in GATES.items():
        found[name] = partial(decide, gate(reserved).eval(), price=price)
    return found


def best_of_all(rows: int, size: int) -> dict[str, float]:
    """Milliseconds by name."""
    logits = torch.randn(rows, size) * 3
    best: dict[str, float] = {}
    for _ in range(TURNS):
        for name, work in works(rows, size).items():
            best[name] = min(best.get(name, 1e9), 1000 * seconds(work, logits))
    return best


@torch.inference_mode()
def main() -> None:
    """Print a row for each gate."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    columns = [(rows, size) for size in VOCABULARIES for rows in ROWS]
    costs: dict[str, list[str]] = {}
    for rows, size in columns:
        best = best_of_all(rows, size)
        for name, cost in best.items():
            shown = f"{cost:.2f} ms" if name == UNIT else f"{cost / best[UNIT]:.2f}"
            costs.setdefault(name, []).append(shown)
    print("| |", " | ".join(f"{rows} × {size:,}" for rows, size in columns), "|")
    print("| --- |", " | ".join(["---:"] * len(columns)), "|")
    for name, row in costs.items():
        print(f"| {name} |", " | ".join(row), "|")


if __name__ == "__main__":
    main()
