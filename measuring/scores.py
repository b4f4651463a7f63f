"""Metrics that are computed in the same way for a running gateway and for a pair in process."""

import math
from collections.abc import Sequence
from itertools import accumulate


def excess(by_teacher: Sequence[bool], fraction: float) -> float:
    """Teacher tokens above fraction * length, in the prefix of a completion that has the most of them.

    Args:
        by_teacher: for each token, whether the teacher wrote it; at least one token.
        fraction: bound on teacher tokens / completion tokens.
    """
    spent = accumulate(by_teacher)
    return max(teacher - fraction * length for length, teacher in enumerate(spent, start=1))


def recovered(quality: float, student: float, teacher: float) -> float:
    """Share of the gap between student and teacher that is closed; nan if there is no gap."""
    return (quality - student) / (teacher - student) if teacher != student else math.nan
