"""The names of the gates, for checking a configuration without loading torch."""

from typing import Literal, get_args

GateName = Literal["learned", "random", "entropy", "margin", "max_probability"]
LEARNED: GateName = "learned"
"""The one that a router was trained with."""
UNTRAINED_GATE: GateName = "entropy"
"""Of a pair without a router: the best on the real pair of docs/results/synopses.md."""
GATE_NAMES: tuple[GateName, ...] = get_args(GateName)
