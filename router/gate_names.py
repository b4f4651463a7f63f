"""The names of the gates, for checking a configuration without loading torch."""

from typing import Literal, get_args

GateName = Literal["learned", "random", "entropy", "margin", "max_probability"]
LEARNED: GateName = "learned"
"""The gate that is trained with a router."""
UNTRAINED_GATE: GateName = "entropy"
"""Gate of a pair without a router; docs/results/synopses.md compares it with the other untrained gates."""
GATE_NAMES: tuple[GateName, ...] = get_args(GateName)
