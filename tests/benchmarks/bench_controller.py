"""What a budget buys: python -m tests.benchmarks.bench_controller

The same synthetic traffic (see tests/traffic.py) and the same global limit, enforced by the real ledger; only
the way in which it is spent differs. Half of the mixture that the prices were calibrated on is hard; the
traffic shifts from 50 % to 10, 90, 30, 70 and 5 % hard requests.

Then the same traffic without a global limit, every request with a budget of its own: one price throughout,
against one that follows what is left of the request's bucket.
"""

import argparse

from router.ledger import FractionOfTraffic, TokensPerWindow
from tests.traffic import (
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


def row(name: str, outcomes: list[Outcome], best: list[float]) -> str:
    rates = [rate for outcome in outcomes for rate in outcome.rates]
    teacher = sum(outcome.teacher for outcome in outcomes)
    value = sum(outcome.value for outcome in outcomes)
    realised = teacher / sum(outcome.teacher + outcome.student for outcome in outcomes)
    refused = sum(outcome.refused for outcome in outcomes) / len(outcomes)
    return (
        f"| {name:<40} | {100 * realised:5.2f} | {100 * min(rates):5.2f} to {100 * max(rates):5.2f} "
        f"| {refused:7.0f} | {value / teacher:5.2f} | {100 * value / sum(best):4.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24_000, help=f"of {STEP_SECONDS} s")
    parser.add_argument("--windows", type=int, nargs="*", default=[60, 300, 900], help="seconds")
    parser.add_argument("--streams", type=int, default=40, help="requests at a time, on average")
    options = parser.parse_args()
    calibration = calibrate()
    traffics = [Traffic(seed, options.steps, options.streams) for seed in range(1, options.seeds + 1)]
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
    print(
        "\nEvery request with a budget of its own: teacher rate, value of all, by the price within a request"
    )
    print("| budget | span, asked for | one price | follows the bucket |")
    print("| ------ | --------------- | --------- | ------------------ |")
    for ask in (SPAN, 1):
        for own in (0.05, 0.15, 0.3):
            cells = []
            for price in (fixed_price(own), controlled):
                outcomes = [
                    run(traffic, ANYTHING, price, calibrate(ask=ask), own, ask) for traffic in traffics
                ]
                teacher, value = (sum(getattr(o, name) for o in outcomes) for name in ("teacher", "value"))
                cells.append(
                    f"{100 * teacher / (teacher + sum(o.student for o in outcomes)):.2f} %, {value:.0f}"
                )
            print(f"| {own} | {SPAN}, by {ask} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
