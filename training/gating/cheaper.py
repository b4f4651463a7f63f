"""Cheaper teachers, which a gate may ask in place of the recipe's `teacher`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from router.checkpoint import Points, TeacherOutput
from router.gate_names import LEARNED
from training.teacher import Teacher

TEACHER = "teacher"
"""Name of the recipe's `teacher`, the dearest one: a gateway calls one without a name so."""

Model = TypeVar("Model", Path, Teacher)


@dataclass(frozen=True)
class Cheaper(Generic[Model]):
    """One of them."""

    name: str
    cost: float
    """Of its token, if one of `teacher` costs 1."""
    model: Model
    """Its directory, or the model itself."""


def costs_of(cheaper: Sequence[Cheaper[Model]]) -> list[float]:
    """Of all teachers, from the cheapest to the dearest; empty if there is one alone."""
    return [*(each.cost for each in cheaper), 1.0] if cheaper else []


def outputs_of(cheaper: Sequence[Cheaper[Model]], alone: Mapping[str, Points]) -> tuple[TeacherOutput, ...]:
    """The outputs of a gate in their order; none if there is one teacher alone.

    Args:
        cheaper: than `teacher`, from the cheapest to the dearest.
        alone: the prices of each teacher by name, if it is the only one, as far as they are known.
    """
    if not cheaper:
        return ()
    outputs = []
    for name, cost in [*((each.name, each.cost) for each in cheaper), (TEACHER, 1.0)]:
        outputs.append(TeacherOutput(name=name, cost=cost, calibration=alone.get(name, [])))
    return tuple(outputs)


def alone(teacher: str) -> str:
    """Name of the learned gate if one of several teachers is the only one."""
    return f"{LEARNED}, {teacher} alone"
