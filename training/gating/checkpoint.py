"""A trained gate, as both stages of the router export it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from router.checkpoint import Fact, Fingerprints, Points, RouterCheckpoint, RouterConfig
from training.gate_config import GateConfig
from training.gating.cheaper import Cheaper, Model, outputs_of
from training.gating.head import Head


@dataclass(frozen=True)
class Calibrated:
    """What is known of a gate's prices."""

    expected_tokens: float
    """Mean length of a completion."""
    prices: dict[str, Points] = field(default_factory=dict)
    """By gate."""
    spares: dict[str, Points] = field(default_factory=dict)
    """By gate: spare prices, see `router.policy.Policy`."""
    alone: dict[str, Points] = field(default_factory=dict)
    """Of each of several teachers, if it is the only one."""


def checkpoint_of(
    head: Head,
    config: GateConfig,
    calibrated: Calibrated,
    cheaper: Sequence[Cheaper[Model]],
    fingerprints: Fingerprints,
    facts: Mapping[str, Fact],
) -> RouterCheckpoint:
    """All of a router.

    Args:
        head: taps and gate.
        config: that it was trained by.
        calibrated: its prices, as far as they are known.
        cheaper: further teachers, from the cheapest to the dearest.
        fingerprints: of the pair.
        facts: what trained it.
    """
    reserved = head.gate.reserved
    return RouterCheckpoint(
        config=RouterConfig(
            reserved_start=reserved.start,
            reserved_count=reserved.count,
            gate_width=config.width,
            span_tokens=config.span_tokens,
            ask_tokens=config.ask_tokens,
            expected_tokens=calibrated.expected_tokens,
            calibration=calibrated.prices,
            spare=calibrated.spares,
            fingerprints=fingerprints,
            budget_prompt=config.template,
            training=dict(facts),
            teachers=outputs_of(cheaper, calibrated.alone),
        ),
        taps=head.taps,
        gate=head.gate.state_dict(),
    )
