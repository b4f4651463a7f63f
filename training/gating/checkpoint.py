"""Makes the router checkpoint of a trained gate, for both stages of the router."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from router.checkpoint import Fact, Fingerprints, Points, RouterCheckpoint, RouterConfig
from training.gate_config import GateConfig
from training.gating.cheaper import Cheaper, Model, outputs_of
from training.gating.head import Head


@dataclass(frozen=True)
class Calibrated:
    """The known prices of the gates, and the mean length of completions."""

    expected_tokens: float
    """Mean length of a completion, in tokens."""
    prices: dict[str, Points] = field(default_factory=dict)
    """Calibrated prices by the name of the gate."""
    spares: dict[str, Points] = field(default_factory=dict)
    """Spare prices by the name of the gate, see `router.policy.Policy`."""
    alone: dict[str, Points] = field(default_factory=dict)
    """By name, prices of each of several teachers if it is the only one that may be asked."""


def checkpoint_of(
    head: Head,
    config: GateConfig,
    calibrated: Calibrated,
    cheaper: Sequence[Cheaper[Model]],
    fingerprints: Fingerprints,
    facts: Mapping[str, Fact],
) -> RouterCheckpoint:
    """The checkpoint of a router.

    Args:
        head: its taps and gate.
        config: the router part of the recipe that trained it.
        calibrated: its known prices.
        cheaper: the cheaper teachers, from the cheapest to the dearest.
        fingerprints: the fingerprints of the pair.
        facts: facts about its training, to keep in the checkpoint.
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
