"""Measurements to check the formulas of `roofline.py` with: published ones on an H100, ours on CPU cores."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from server.bench.cost_model import Traffic
from server.bench.results import Row
from server.bench.roofline import Load, Machine, Model, alone, cooperation, speculative

PUBLISHED: Mapping[tuple[int, int], Mapping[int, float]] = {
    (128, 128): {1: 145, 4: 548, 16: 2156, 64: 6958, 256: 13_093},
    (128, 1024): {1: 146, 4: 548, 16: 2117, 64: 6597, 256: 13_567},
    (1024, 128): {1: 141, 4: 532, 16: 1757, 64: 2847, 256: 3618},
    (2048, 2048): {1: 142, 4: 506, 16: 1625, 64: 3463},
    (8192, 512): {1: 129, 4: 378, 16: 784, 64: 982},
}
"""Output tokens/s of Qwen3-8B in BF16, vLLM 0.30 on one H100 SXM, by (prompt, completion) and streams.

silybench-data (github.com/tgarg01/silybench-data, CC BY 4.0), run 20260924T125045Z, perf_points.csv.
"""

TEACHER = Model("heavy teacher", resident=412e6, weights=412e6, flops=206e6, cache=0)
"""The teacher of docs/results/cooperation.md: 103 M parameters in float32. Its small cache does not count."""
CORE = Machine(
    bandwidth=412e6 / 35.4e-3,
    flops=206e6 / 2.54e-3,
    memory=math.inf,
    step=1.69e-3,
    draft=1.69e-3,
    call=5.5e-3,
    block=32,
    overlaps=False,
    one_card=False,
)
"""A core, from docs/results/capacity.md: the teacher's step takes 37.1 ms, the student's 1.69 ms. The teacher
reads a position in 2.54 ms. A call's 5.5 ms are the share *network* of docs/results/cooperation.md."""
STUDENT = Model("student", resident=0.9e6, weights=0.9e6, flops=CORE.flops * 0.018e-3, cache=0)
"""The student of the same page: it reads a position in 0.018 ms."""
TWO_CORES = replace(CORE, bandwidth=1.07 * CORE.bandwidth, flops=1.4 * CORE.flops)
"""Two cores, by how much faster the teacher alone is with them."""
ACCEPTED = 0.91
"""Probability that a drafted token is accepted: 1.79 of 2, 3.22 of 4 and 4.41 of 6 were."""


@dataclass(frozen=True)
class MeasuredRow:
    """A row of docs/results/cooperation.md."""

    streams: int
    side: str
    tokens_per_second: float
    drafts: int = 0
    rate: float = 0.0
    calls: float = 0.0
    """Teacher calls of a request."""


ROWS = (
    MeasuredRow(1, "teacher alone, 1 core", 22.6),
    MeasuredRow(16, "teacher alone, 1 core", 116),
    MeasuredRow(1, "speculative, 2 drafts", 50.4, drafts=2),
    MeasuredRow(1, "speculative, 4 drafts", 68.8, drafts=4),
    MeasuredRow(1, "speculative, 6 drafts", 77.1, drafts=6),
    MeasuredRow(16, "speculative, 2 drafts", 184, drafts=2),
    MeasuredRow(16, "speculative, 4 drafts", 203, drafts=4),
    MeasuredRow(16, "speculative, 6 drafts", 232, drafts=6),
    MeasuredRow(1, "cooperation, 0.05", 204, rate=0.027, calls=0.667),
    MeasuredRow(1, "cooperation, 0.1", 162, rate=0.055, calls=1.33),
    MeasuredRow(1, "cooperation, 0.2", 102, rate=0.089, calls=2.33),
    MeasuredRow(1, "cooperation, 0.5", 38.3, rate=0.261, calls=8.0),
    MeasuredRow(16, "cooperation, 0.05", 190, rate=0.050, calls=1.62),
    MeasuredRow(16, "cooperation, 0.1", 145, rate=0.076, calls=2.44),
    MeasuredRow(16, "cooperation, 0.2", 127, rate=0.092, calls=2.94),
    MeasuredRow(16, "cooperation, 0.5", 52.6, rate=0.291, calls=9.19),
)
PROMPT = 31
COMPLETION = 33
"""Tokens of a prompt and of a completion, in the pair's examples."""


def predicted(row: MeasuredRow) -> float:
    """Tokens/s of a row by the formulas, from the rate and the calls that were realised."""
    tokens = row.rate * COMPLETION / row.calls if row.calls else 1.0
    load = Load(Traffic(PROMPT, COMPLETION, row.rate, tokens), row.streams)
    if row.drafts:
        return speculative(TWO_CORES, STUDENT, TEACHER, load, ACCEPTED, row.drafts)
    if row.calls:
        return cooperation(CORE, STUDENT, TEACHER, load)
    return alone(CORE, TEACHER, load)


def core_rows() -> list[Row]:
    """Measured and predicted tokens/s on CPU cores."""
    rows: list[Row] = []
    for row in ROWS:
        found = predicted(row)
        rows.append(
            {
                "streams": row.streams,
                "side": row.side,
                "tokens/s": float(row.tokens_per_second),
                "predicted": found,
                "predicted / measured": found / row.tokens_per_second,
            }
        )
    return rows


def published_rows(machine: Machine, model: Model) -> list[Row]:
    """Measured and predicted tokens/s of the teacher alone on an H100."""
    rows: list[Row] = []
    for (prompt, completion), measured in PUBLISHED.items():
        for streams, speed in measured.items():
            found = alone(machine, model, Load(Traffic(prompt, completion, 0.0), streams))
            rows.append(
                {
                    "prompt": prompt,
                    "completion": completion,
                    "streams": streams,
                    "tokens/s": float(speed),
                    "predicted": found,
                    "predicted / measured": found / speed,
                }
            )
    return rows
