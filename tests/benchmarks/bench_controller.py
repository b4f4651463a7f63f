"""Compares what a budget buys under several policies.

All policies get the same synthetic traffic (see tests/helpers/traffic.py) and the same global limit, which
the real ledger enforces. Half of the requests that the prices were calibrated on are hard. The traffic shifts
from 50 % to 10, 90, 30, 70 and 5 % hard requests.

The second table has the same traffic without a global limit: every request has a budget of its own. It
compares one price throughout with a price that follows the rest of the request's bucket.

    python -m tests.benchmarks.bench_controller
"""

import argparse
from collections.abc import Sequence

from router.ledger import FractionOfTraffic, TokensPerWindow
from tests.helpers.traffic import (
    SPAN,
    STEP_SECONDS,
    Outcome,
    Traffic,
    calibrate,
    controlled,
    first_come,
    fixed_price,
    fixed_schedule,
    hindsight,
    run,
)

RATE = 0.15
OWN = 0.8
"""Fraction in every request's own budget: more than there is for all."""
ANYTHING = TokensPerWindow(tokens=10**12, window_seconds=3600)


def total(outcomes: Sequence[Outcome]) -> Outcome:
    """The sum of several outcomes."""
    together = Outcome()
    for outcome in outcomes:
        together.teacher += outcome.teacher
        together.student += outcome.student
        together.value += outcome.value
        together.refused += outcome.refused
        together.rates += outcome.rates
    return together


def row(name: str, outcomes: Sequence[Outcome], best: Sequence[float]) -> str:
    """One line of the first table; ``best``: the most value that each traffic allows."""
    together = total(outcomes)
    lowest = 100 * min(together.rates)
    highest = 100 * max(together.rates)
    return (
        f"| {name:<40} | {100 * together.rate:5.2f} | {lowest:5.2f} to {highest:5.2f} "
        f"| {together.refused / len(outcomes):7.0f} | {together.value / together.teacher:5.2f} "
        f"| {100 * together.value / sum(best):4.0f} |"
    )


def compare_global_limits(options: argparse.Namespace, traffics: Sequence[Traffic]) -> None:
    """Compare policies under the same global limit."""
    calibration = calibrate()
    best = [hindsight(traffic, RATE) for traffic in traffics] if options.windows else []
    for window in options.windows:
        fraction = FractionOfTraffic(fraction=RATE, window_seconds=window, slack_tokens=SPAN)
        tokens = TokensPerWindow(
            tokens=int(RATE * options.streams / STEP_SECONDS * window), window_seconds=window
        )
        print(f"\nA global limit of {100 * RATE:g} % over {window} s")
        print(f"| {'spent':<40} | rate  | over a window  | refused | value | of best |")
        print(f"| {'-' * 40} | ----- | -------------- | ------- | ----- | ------- |")
        for name, limit, price, own in (
            ("first come, first served", fraction, first_come, OWN),
            ("fixed schedule, a span every so often", fraction, fixed_schedule(RATE), OWN),
            ("an equal share for every request", fraction, first_come, RATE),
            ("fixed price, as calibrated", fraction, fixed_price(RATE), OWN),
            ("controller", fraction, controlled, OWN),
            ("controller, limit in tokens", tokens, controlled, OWN),
        ):
            outcomes = [run(traffic, limit, price, calibration, own) for traffic in traffics]
            print(row(name, outcomes, best), flush=True)


def compare_own_budgets(traffics: Sequence[Traffic]) -> None:
    """Compare one price for a request with a price that follows its bucket, without a global limit."""
    print(
        "\nEvery request with a budget of its own: teacher rate, value of all, by the price within a request"
    )
    print("| budget | span, asked for | one price | follows the bucket |")
    print("| ------ | --------------- | --------- | ------------------ |")
    for ask in (SPAN, 1):
        calibration = calibrate(ask=ask)
        for own in (0.05, 0.15, 0.3):
            cells = []
            for price in (fixed_price(own), controlled):
                outcomes = [run(traffic, ANYTHING, price, calibration, own, ask) for traffic in traffics]
                together = total(outcomes)
                cells.append(f"{100 * together.rate:.2f} %, {together.value:.0f}")
            print(f"| {own} | {SPAN}, by {ask} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24_000, help=f"of {STEP_SECONDS} s")
    parser.add_argument("--windows", type=int, nargs="*", default=[60, 300, 900], help="seconds")
    parser.add_argument("--streams", type=int, default=40, help="requests at a time, on average")
    options = parser.parse_args()
    traffics = [Traffic(seed, options.steps, options.streams) for seed in range(1, options.seeds + 1)]
    compare_global_limits(options, traffics)
    compare_own_budgets(traffics)


if __name__ == "__main__":
    main()
