"""Compares realised rates with aimed rates, while a calibration learns.

There are four distributions of scores, which shift after a teacher's token. With each, 100 completions teach
the calibration and 200 are measured.

    python -m tests.benchmarks.bench_adaptive
"""

from tests.helpers.scored_traffic import ScoredTraffic

FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.5)
TRAFFIC = (("entropy", 0.3, -1.0), ("entropy", 3.0, 1.0), ("margin", 0.2, 0.0), ("learned", 0.01, -0.5))
"""Gate, scale of its scores, and their shift after a teacher's token."""


def realised(gate: str, scale: float, after_teacher: float, fraction: float) -> float:
    """The realised rate after the calibration has learned."""
    traffic = ScoredTraffic(gate, scale=scale, after_teacher=after_teacher)
    traffic.serve(fraction, 100)
    return traffic.serve(fraction, 200)


def main() -> None:
    """Print a row for each kind of traffic."""
    print("| gate | scale | shift |", " | ".join(f"{fraction:g}" for fraction in FRACTIONS), "|")
    for gate, scale, shift in TRAFFIC:
        rates = [f"{realised(gate, scale, shift, fraction):.3f}" for fraction in FRACTIONS]
        print(f"| {gate} | {scale} | {shift} |", " | ".join(rates), "|")


if __name__ == "__main__":
    main()
