"""Cheaper teachers, which a gate may ask in place of the recipe's `teacher`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from router.checkpoint import Points, TeacherOutput
from router.gate_names import LEARNED
from training.teacher import Teacher

TEACHER = "teacher"
"""Name of the recipe's `teacher`, the dearest one; a gateway gives this name to a teacher without a name."""

Model = TypeVar("Model", Path, Teacher)


@dataclass(frozen=True)
class Cheaper(Generic[Model]):
    """A cheaper teacher."""

    name: str
    cost: float
    """Cost of one of its tokens, if a token of `teacher` costs 1."""
    model: Model
    """Directory of the model, or the model itself."""


def costs_of(cheaper: Sequence[Cheaper[Model]]) -> list[float]:
    """Costs of all teachers' tokens, from the cheapest to the dearest; empty if there is only one teacher."""
    return [*(each.cost for each in cheaper), 1.0] if cheaper else []


def outputs_of(cheaper: Sequence[Cheaper[Model]], alone: Mapping[str, Points]) -> tuple[TeacherOutput, ...]:
    """The teachers of a gate's outputs, in their order; none if there is only one teacher.

    Args:
        cheaper: the teachers that are cheaper than `teacher`, from the cheapest to the dearest.
        alone: by name, the known prices of each teacher if it is the only one that may be asked.
    """
    if not cheaper:
        return ()
    outputs = []
    for name, cost in [*((each.name, each.cost) for each in cheaper), (TEACHER, 1.0)]:
        outputs.append(TeacherOutput(name=name, cost=cost, calibration=alone.get(name, [])))
    return tuple(outputs)


def alone(teacher: str) -> str:
    """Name of the learned gate that may ask only this one of several teachers."""
    return f"{LEARNED}, {teacher} alone"
