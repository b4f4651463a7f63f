"""What a gate costs at a step: milliseconds of CPU time for 32 rows, on one thread, best of ten.

Compared with reading the logits once (`amax`) and with one `log_softmax`.

    python -m tests.benchmarks.bench_gate
"""

import time
from collections.abc import Callable
from functools import partial

import torch

from router.gate import GATES
from router.reserved import ReservedRows
from server.gate_processor import decide

ROWS = 32
VOCABULARIES = (49_184, 151_936)


def best_of_ten(work: Callable[[torch.Tensor], object], logits: torch.Tensor) -> float:
    """Milliseconds of CPU time; each run gets logits of its own, as `decide` changes them."""
    times = []
    for _ in range(10):
        own = logits.clone()
        start = time.process_time()
        work(own)
        times.append(time.process_time() - start)
    return 1000 * min(times)


def works(size: int) -> dict[str, Callable[[torch.Tensor], object]]:
    """What is timed, by name, for a vocabulary of this size."""
    reserved = ReservedRows(size - 32)
    price = torch.full((ROWS,), 1e9)
    found: dict[str, Callable[[torch.Tensor], object]] = {
        "amax": partial(torch.amax, dim=-1),
        "log_softmax": partial(torch.log_softmax, dim=-1),
    }
    for name, gate in GATES.items():
        found[name] = partial(decide, gate(reserved).eval(), price=price)
    return found


@torch.inference_mode()
def main() -> None:
    """Print a row for each gate."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    costs: dict[str, list[str]] = {}
    for size in VOCABULARIES:
        logits = torch.randn(ROWS, size) * 3
        for name, work in works(size).items():
            costs.setdefault(name, []).append(f"{best_of_ten(work, logits):.1f}")
    print("| |", " | ".join(f"{size:,} logits" for size in VOCABULARIES), "|")
    for name, row in costs.items():
        print(f"| {name} |", " | ".join(row), "|")


if __name__ == "__main__":
    main()
