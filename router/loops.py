"""Compiled single-threaded CPU loops for the features that gates read from logits.

torch reads the rows once for each of some twenty operations. A loop reads them twice. numba compiles a loop
at its first call. It needs no C++ compiler, and vLLM depends on it.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router.feature_layout import LOG_PROB_FLOOR, N_CONFIDENCE, TOP_LOG_PROBS

Floats = NDArray[np.float32]
Loop = TypeVar("Loop", bound=Callable[..., Any])

LANES = 256
"""Number of lanes; lane i holds tokens i, i + LANES, … The best tokens are in lanes with large maxima."""
LOG2_E = np.float32(math.log2(math.e))
LN_2 = math.log(2)
LEAST_POWER = np.float32(-126)
"""Two to this power is the smallest normal float32. Added to the best token's 1, it changes nothing."""
C0, C1, C2, C3, C4, C5, C6 = (np.float32(math.log(2) ** i / math.factorial(i)) for i in range(7))
"""Taylor coefficients of 2 ** x. For x from -.5 to .5, the error is as small as a float32's precision."""


def by_loop(loop: Callable[[Floats, int, Floats], None], logits: Tensor, visible: int, *width: int) -> Tensor:
    """The results of a loop for the first ``visible`` logits of (..., V): float32 (...) or (..., width)."""
    rows = np.ascontiguousarray(logits.float().numpy())
    found = np.empty((*rows.shape[:-1], *width), np.float32)
    loop(rows.reshape(-1, rows.shape[-1]), visible, found.reshape(-1, *width))
    return torch.from_numpy(found)


def compiled(loop: Loop) -> Loop:
    """Compile a loop, in which sums may be reordered for vector instructions. Other threads run meanwhile.

    If numba's own variable NUMBA_CACHE_DIR names a directory, the next process finds the compiled loop there.
    """
    keep = bool(numba.config.CACHE_DIR)
    compile_loop = numba.njit(nogil=True, fastmath={"reassoc", "contract", "arcp", "nsz"}, cache=keep)
    compiled_loop: Loop = compile_loop(loop)
    return compiled_loop


@compiled
def insert(x: float, best: Floats) -> None:
    """Insert x into ``best``, which is in falling order, and drop the least entry."""
    place = len(best) - 1
    while place > 0 and best[place - 1] < x:
        best[place] = best[place - 1]
        place -= 1
    best[place] = x


@compiled
def find_maxima(row: Floats, lanes: Floats) -> None:
    """Fill ``lanes`` with the largest logit of each lane, -inf where a lane is empty."""
    lanes[:] = -np.inf
    for start in range(0, len(row), len(lanes)):
        part = row[start : start + len(lanes)]
        for i in range(len(part)):
            lanes[i] = part[i] if part[i] > lanes[i] else lanes[i]


@compiled
def find_best(row: Floats, lanes: Floats, best: Floats) -> None:
    """Fill ``best`` with the largest logits in falling order, padded with -inf; ``lanes``: scratch space."""
    find_maxima(row, lanes)
    best[:] = -np.inf
    for x in lanes:
        if x > best[-1]:
            insert(x, best)
    least = best[-1]
    best[:] = -np.inf
    for i in range(len(lanes)):
        if lanes[i] >= least and lanes[i] > -np.inf:
            for x in row[i :: len(lanes)]:
                if x > best[-1]:
                    insert(x, best)


@compiled
def two_to(power: np.float32) -> np.float32:
    """2 ** power, from LEAST_POWER to 0: a polynomial, with the whole part added to its exponent."""
    whole = np.rint(power)
    x = power - whole
    y = C0 + x * (C1 + x * (C2 + x * (C3 + x * (C4 + x * (C5 + x * C6)))))
    bits = np.int32(np.float32(y).view(np.int32) + (np.int32(whole) << np.int32(23)))
    return bits.view(np.float32)


@compiled
def spread(row: Floats, best: np.float32) -> tuple[float, float]:
    """How far a distribution is spread out, in nats: (log of the sum of exp(x - best), entropy).

    Entropy is log sum exp(x) - sum p x, with x taken relative to its maximum.
    """
    if not np.isfinite(best):
        return np.nan, np.nan
    total = np.float32(0)
    weighted = np.float32(0)
    for i in range(len(row)):
        power = (row[i] - best) * LOG2_E
        power = power if power > LEAST_POWER else LEAST_POWER
        weight = two_to(power)
        total += weight
        weighted += weight * power
    log_total = math.log(total)
    return log_total, log_total - float(weighted / total) * LN_2


@compiled
def find_best_and_spread(row: Floats, lanes: Floats, best: Floats) -> tuple[float, float]:
    """Fill ``best`` as `find_best` does, and return what `spread` returns."""
    find_best(row, lanes, best)
    return spread(row, best[0])


@compiled
def margin_loop(rows: Floats, visible: int, found: Floats) -> None:
    """Fill ``found`` (B,) with the gap of the two largest of the first ``visible`` columns of (B, V)."""
    lanes = np.empty(LANES, np.float32)
    best = np.empty(2, np.float32)
    for i in range(len(rows)):
        find_best(rows[i, :visible], lanes, best)
        found[i] = best[0] - best[1]


@compiled
def entropy_loop(rows: Floats, visible: int, found: Floats) -> None:
    """Fill ``found`` (B,) with the entropy, in nats, of the first ``visible`` columns of (B, V)."""
    lanes = np.empty(LANES, np.float32)
    best = np.empty(1, np.float32)
    for i in range(len(rows)):
        found[i] = find_best_and_spread(rows[i, :visible], lanes, best)[1]


@compiled
def best_probability_loop(rows: Floats, visible: int, found: Floats) -> None:
    """Fill ``found`` (B,) with the largest probability among the first ``visible`` columns of (B, V)."""
    lanes = np.empty(LANES, np.float32)
    best = np.empty(1, np.float32)
    for i in range(len(rows)):
        found[i] = math.exp(-find_best_and_spread(rows[i, :visible], lanes, best)[0])


@compiled
def features_loop(rows: Floats, visible: int, found: Floats) -> None:
    """Fill ``found`` (B, taps + 10) with taps, as many as fit, and `router.features.confidence`."""
    lanes = np.empty(LANES, np.float32)
    taps = found.shape[1] - N_CONFIDENCE
    for i in range(len(rows)):
        for j in range(taps):
            found[i, j] = rows[i, visible + 1 + j]
        best = found[i, taps:-2]
        log_total, entropy = find_best_and_spread(rows[i, :visible], lanes, best)
        largest = best[0]
        for j in range(TOP_LOG_PROBS):
            best[j] = max(best[j] - largest - log_total, LOG_PROB_FLOOR)
        found[i, -2] = entropy
        found[i, -1] = best[0] - best[1]
