"""Synthetic traffic for a calibration that learns: invented scores, the real policy and the real bucket."""

import math
import random

from router.adaptive import AdaptiveCalibration, SeenScores
from router.budget import Bucket, Budget
from router.policy import Policy

TOKENS = 24


class ScoredTraffic:
    """Completions in which a score depends on who wrote the token before; with the engine's sketch."""

    def __init__(
        self, gate: str, *, scale: float, after_teacher: float, ask_tokens: int = 1, seed: int = 0
    ) -> None:
        self.calibration = AdaptiveCalibration(gate, ask_tokens)
        self.policy = Policy(self.calibration, expected_tokens=TOKENS)
        self.ask_tokens = ask_tokens
        self.rng = random.Random(seed)
        self.scale, self.after_teacher = scale, after_teacher
        self.scores: list[float] = []

    def score(self, teacher_before: bool) -> float:
        shift = self.after_teacher if teacher_before else 0.0
        value = math.exp(self.rng.gauss(shift, 1.5)) * self.scale
        return -1.0 / value if self.calibration.gate == "margin" else value

    def complete(self, fraction: float) -> tuple[int, int]:
        """Write one completion; returns its teacher tokens and all its tokens."""
        bucket = Bucket(Budget(fraction=fraction), span_tokens=4, ask_tokens=self.ask_tokens)
        length = self.rng.randint(TOKENS // 2, TOKENS * 3 // 2)
        written = teacher = 0
        teacher_before = False
        while written < length:
            terms = self.policy.terms(bucket, written, length)
            asked = False
            start = written
            while written < length and not asked:
                score = self.score(teacher_before)
                if written - start >= terms.not_before and terms.price < math.inf:
                    self.scores.append(score)
                    asked = score > terms.price
                if not asked:
                    written += 1
                    teacher_before = False
            if asked:
                grant = bucket.reserve(written, length - written)
                assert grant is not None
                teacher += grant.tokens
                written += grant.tokens
                teacher_before = True
            assert teacher <= fraction * written + bucket.span_tokens
        return teacher, written

    def serve(self, fraction: float, completions: int) -> float:
        """Write several completions; returns their realised rate."""
        teacher = written = 0
        for number in range(completions):
            by_teacher, tokens = self.complete(fraction)
            self.calibration.observe(fraction, by_teacher, tokens)
            teacher += by_teacher
            written += tokens
            if number % 25 == 0:
                self.show_scores()
        return teacher / written

    def show_scores(self) -> None:
        """Give the calibration the sketch's scores, as the gateway does now and then."""
        recent = sorted(self.scores[-8192:])
        if recent:
            steps = [recent[len(recent) * step // 256] for step in range(256)]
            self.calibration.see(SeenScores(steps, len(recent)))
