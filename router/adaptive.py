"""A calibration learned while serving: prices from the scores of live traffic, corrected by realised rates.

It is for gates without a measured calibration. Two things are learned while requests are served:

- The distribution of the gate's scores. The price of a rate is a quantile of it.
- A correction for each rate. Asking changes what the student writes next, and a bucket holds calls back.
  So the realised rate differs from the one that the quantile promises.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

KNOTS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
"""Rates whose corrections are learned; between them the correction is interpolated."""
WINDOW_TOKENS = 400
"""Completion tokens over which a realised rate of twice the aim moves the correction by one."""
WINDOW_PER_STREAM = 20
"""The window grows by this for every running request: their next tokens still answer to an older price."""
MOST = 6.0
"""Largest correction of a rate's logit, up or down."""
BORROWED_TOKENS = 400
"""A knot with this many completion tokens of its own follows other rates half as much as one without."""
MEMORY_TOKENS = 10_000
"""Realised rates are reported over about this many completion tokens."""
PRIOR_POSITIONS = 64
"""The prior weighs as much as this many positions, so the scores that were seen soon outweigh it."""

STEPS = [step / 100 for step in range(101)]
PRIOR_SCORES: dict[str, tuple[float, ...]] = {
    "random": tuple(STEPS),
    # Language models are nearly certain at half of their positions; the rest spreads over several nats.
    "entropy": tuple(4.0 * step**3 for step in STEPS),
    "margin": tuple(-12.0 * (1 - step) ** 1.5 for step in STEPS),
    "max_probability": tuple(-((1 - step) ** 0.25) for step in STEPS),
    "learned": tuple(2.0 * step**3 for step in STEPS),
}
"""Prior distribution of each gate's scores: the scores at even quantiles, increasing."""


class SeenScores(NamedTuple):
    """Scores of the positions at which the student could have asked."""

    quantiles: Sequence[float]
    """Scores at even quantiles from the least to the greatest, increasing."""
    positions: int
    """Number of positions that the quantiles summarise."""


class Realised(NamedTuple):
    """The realised rate for one aimed rate, over recent traffic."""

    aim: float
    rate: float
    completion_tokens: float
    """Completion tokens that the rate was measured on; older ones count less."""


class TokenCount(NamedTuple):
    """Tokens counted at one knot; older ones count less."""

    teacher_tokens: float
    completion_tokens: float


@dataclass
class Correction:
    """The learned correction at one knot."""

    offset: float = 0.0
    """Added to the logit of the rate before its quantile is taken."""
    teacher_tokens: float = 0.0
    completion_tokens: float = 0.0

    def count(self, teacher_tokens: float, completion_tokens: float) -> None:
        """Add tokens to the counts; the older ones fade."""
        fade = math.exp(-completion_tokens / MEMORY_TOKENS)
        self.teacher_tokens = self.teacher_tokens * fade + teacher_tokens
        self.completion_tokens = self.completion_tokens * fade + completion_tokens

    def move(self, step: float) -> None:
        """Change the offset, within its bounds."""
        self.offset = min(max(self.offset + step, -MOST), MOST)


class SavedState(BaseModel):
    """State that survives a restart."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gate: str
    quantiles: tuple[float, ...]
    positions: int
    offsets: tuple[float, ...]
    counts: tuple[TokenCount, ...] = ()
    """Token counts of each knot; files of older versions have none."""


class AdaptiveCalibration:
    """Rates to prices, learned while serving. It answers like a measured `Calibration`.

    `price` answers at any time. `see` takes newer scores, and `observe` takes realised tokens.
    """

    def __init__(self, gate: str, ask_tokens: int) -> None:
        """Start from the gate's prior.

        Args:
            gate: a name of `router.gate.GATES`.
            ask_tokens: tokens of one teacher call.
        """
        self.gate = gate
        self.ask_tokens = ask_tokens
        self.observations = 0
        """Number of calls of `observe` that changed something."""
        self._corrections = [Correction() for _ in KNOTS]
        self._restored = SeenScores((), 0)
        self._seen = SeenScores((), 0)
        self.see(self._seen)

    def see(self, scores: SeenScores) -> None:
        """Take the distribution of scores that the engine has seen; it replaces that of the last call.

        A restored distribution loses weight with every position that the engine sees. It has none left once
        the engine has seen as many positions.
        """
        self._seen = scores
        older = max(self._restored.positions - scores.positions, 0)
        weighted = _weighted(PRIOR_SCORES[self.gate], PRIOR_POSITIONS)
        weighted += _weighted(self._restored.quantiles, older)
        weighted += _weighted(scores.quantiles, scores.positions)
        weighted.sort()
        self._scores = [score for score, _ in weighted]
        self._below = list(accumulate(weight for _, weight in weighted))

    def observe(self, aim: float, teacher_tokens: int, completion_tokens: int, *, running: int = 1) -> None:
        """Learn from a stretch of a completion that was written under one fraction.

        Corrections move against the error: dual ascent in the logit of the rate, as `RateController` does it.

        Args:
            aim: the fraction, in (0, 1).
            teacher_tokens: tokens of the stretch that the teacher wrote.
            completion_tokens: all tokens of the stretch.
            running: requests that are being written at this moment.
        """
        if not completion_tokens or not 0.0 < aim < 1.0:
            return
        self.observations += 1
        window = WINDOW_TOKENS + WINDOW_PER_STREAM * running
        error = (aim * completion_tokens - teacher_tokens) / (aim * window)
        place = _place(aim)
        for knot, correction in enumerate(self._corrections):
            weight = place.weight(knot)
            if weight > 0.0:
                correction.count(weight * teacher_tokens, weight * completion_tokens)
                correction.move(weight * error)
            else:  # a rate with little traffic of its own follows the others
                correction.move(error * BORROWED_TOKENS / (BORROWED_TOKENS + correction.completion_tokens))

    def price(self, rate: float) -> float:
        """Price for a teacher rate; never (inf) at 0, always (-inf) at 1."""
        if rate <= 0.0:
            return math.inf
        if rate >= 1.0:
            return -math.inf
        corrected = self._corrected(rate)
        # Asking at a share p of the positions for K tokens gives the rate p K / (p K + 1 - p).
        share = corrected / (self.ask_tokens * (1.0 - corrected) + corrected)
        return self._quantile(1.0 - share)

    @property
    def points(self) -> tuple[tuple[float, float], ...]:
        """(rate, price) at the knots, as a measured calibration has them."""
        return tuple(zip(KNOTS, map(self.price, KNOTS), strict=True))

    @property
    def realised(self) -> list[Realised]:
        """The realised rate at each knot that has traffic."""
        found = []
        for knot, correction in zip(KNOTS, self._corrections, strict=True):
            if correction.completion_tokens > 0.0:
                rate = correction.teacher_tokens / correction.completion_tokens
                found.append(Realised(knot, rate, correction.completion_tokens))
        return found

    @property
    def state(self) -> SavedState:
        """The state that `restore` takes."""
        offsets = []
        counts = []
        for correction in self._corrections:
            offsets.append(correction.offset)
            counts.append(TokenCount(correction.teacher_tokens, correction.completion_tokens))
        enough = self._seen.positions >= self._restored.positions
        scores = self._seen if enough else self._restored
        return SavedState(
            gate=self.gate,
            quantiles=tuple(scores.quantiles),
            positions=scores.positions,
            offsets=tuple(offsets),
            counts=tuple(counts),
        )

    def restore(self, state: SavedState) -> bool:
        """Continue from a saved state. False if it has another gate or other knots: then nothing changes."""
        if state.gate != self.gate or len(state.offsets) != len(KNOTS):
            return False
        self._restored = SeenScores(state.quantiles, state.positions)
        self.see(SeenScores((), 0))
        for correction, offset in zip(self._corrections, state.offsets, strict=True):
            correction.offset = offset
        for correction, count in zip(self._corrections, state.counts, strict=False):
            correction.teacher_tokens, correction.completion_tokens = count
        return True

    def _corrected(self, rate: float) -> float:
        """The rate with its correction applied; it never decreases as the rate increases."""
        logits = []
        highest = -math.inf
        for knot, correction in zip(KNOTS, self._corrections, strict=True):
            highest = max(highest, _logit(knot) + correction.offset)
            logits.append(highest)
        place = _place(rate)
        left = logits[place.left]
        logit = left + place.share * (logits[place.left + 1] - left)
        return 1.0 / (1.0 + math.exp(-logit))

    def _quantile(self, share: float) -> float:
        """The score that is not exceeded at this share of the positions."""
        wanted = share * self._below[-1]
        return self._scores[min(bisect_right(self._below, wanted), len(self._scores) - 1)]


def _weighted(quantiles: Sequence[float], positions: int) -> list[tuple[float, float]]:
    """(score, weight) of each quantile; the weights add up to the number of positions."""
    return list(zip(quantiles, repeat(positions / max(len(quantiles), 1))))


class Place(NamedTuple):
    """The place of a rate between two knots, in logits. A rate beyond all knots has the place of the last."""

    left: int
    """Index of the knot to the left."""
    share: float
    """Distance from that knot, as a share of the distance between both knots."""

    def weight(self, knot: int) -> float:
        """Weight of a knot for the rate: 1 at the knot itself, 0 at the next knot and beyond."""
        if knot == self.left:
            return 1.0 - self.share
        return self.share if knot == self.left + 1 else 0.0


def _place(rate: float) -> Place:
    rate = min(max(rate, KNOTS[0]), KNOTS[-1])
    right = max(bisect_left(KNOTS, rate), 1)
    low = _logit(KNOTS[right - 1])
    high = _logit(KNOTS[right])
    return Place(right - 1, (_logit(rate) - low) / (high - low))


def _logit(rate: float) -> float:
    return math.log(rate / (1.0 - rate))
