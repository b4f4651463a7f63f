"""Plots of the sections, made only from their tables, so that a stored result can be plotted again."""

import math
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.bench.results import Row, Section, Spread, Value

DPI = 120
MARKERS = {
    "student alone": "s",
    "teacher alone": "D",
    "speculative": "^",
    "cooperation": "o",
    "cooperation on both cores": "P",
}
"""Markers by the kind of a side, which is the first part of its name."""


def plot(name: str, section: Section, directory: Path) -> list[Path]:
    """Write a section's pictures.

    Returns:
        Their files: none for a section without pictures, or if matplotlib is missing.
    """
    if name not in DRAWN:
        return []
    try:
        import matplotlib
    except ImportError:  # the extra `bench`
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = DRAWN[name](pyplot, section)
    file = directory / f"{name}.png"
    figure.savefig(file, dpi=DPI, bbox_inches="tight")
    pyplot.close(figure)
    return [file]


def _points(pyplot: Any, section: Section) -> Any:
    """Quality against tokens/s, one panel for each number of streams."""
    rows = section.tables["points"].rows
    columns = [column for column in rows[0] if column.startswith("tokens/s")]
    figure, panels = pyplot.subplots(1, len(columns), figsize=(6 * len(columns), 4.5), sharey=True)
    for axes, column in zip(panels, columns, strict=True):
        _panel(axes, rows, column)
        _plain_numbers(pyplot, axes.xaxis)
    panels[0].set_ylabel("exact match, %")
    panels[0].legend(loc="lower left")
    return figure


def _panel(axes: Any, rows: Sequence[Row], column: str) -> None:
    groups = _grouped(rows, _kind)
    for kind, marker in MARKERS.items():
        group = groups.get(kind, [])
        if not group:  # left out of this run
            continue
        line = ""
        place: dict[str, Any] = {"xytext": (0, 6)}
        if kind.startswith("cooperation"):
            line = "-"
            place = {"xytext": (-3, -5), "ha": "right", "va": "top"}
        x = _numbers(group, column)
        y = 100 * _numbers(group, "exact match")
        axes.plot(x, y, marker, linestyle=line, label=kind)
        for index, row in enumerate(group):
            point = (x[index], y[index])
            axes.annotate(_detail(row), point, textcoords="offset points", fontsize=7, rotation=60, **place)
    streams = column.rpartition(" ")[2]
    axes.set(xlabel="tokens/s", title=f"{streams} stream{'' if streams == '1' else 's'}", xscale="log")
    axes.grid(alpha=0.3)
    axes.margins(0.1, 0.2)


def _shares(pyplot: Any, section: Section) -> Any:
    """Parts of a request's time, one bar for each side and number of streams."""
    rows = section.tables["split"].rows
    labels: list[str] = []
    for row in rows:
        labels.append(f"{row['streams']} × {_detail(row)}")
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(rows) + 1))
    left = np.zeros(len(rows))
    parts = [column for column in rows[0] if column not in ("streams", "side")]
    for index, part in enumerate(parts):
        widths = np.maximum(0.0, _numbers(rows, part))
        axes.barh(labels, widths, left=left, label=part, color=pyplot.colormaps["tab20"](index))
        left = left + widths
    axes.set(xlabel="share of the requests' time", ylabel="streams × budget", xlim=(0, 1))
    axes.invert_yaxis()
    axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left", fontsize=8)
    return figure


def _capacity(pyplot: Any, section: Section) -> Any:
    """Tokens/s against streams, one line for each budget."""
    rows = section.tables["streams"].rows
    return _streams(pyplot, _grouped(rows, lambda row: f"budget {row['budget']}"))


def _overhead(pyplot: Any, section: Section) -> Any:
    """Tokens/s against streams, one line for each budget of the gateway, one for vLLM's own server."""
    return _streams(pyplot, _grouped(section.tables["client"].rows, itemgetter("server")))


def _teacher_call(pyplot: Any, section: Section) -> Any:
    """Milliseconds of a call, two lines for each endpoint: the teacher's front end and the gateway's time."""
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for endpoint, rows in _grouped(section.tables["calls"].rows, itemgetter("endpoint")).items():
        x = _numbers(rows, "prefix")
        for part, line in (("teacher's front end", "-"), ("gateway", "--")):
            y = _numbers(rows, part)
            spread = _ranges(rows, part)
            axes.errorbar(x, y, spread, linestyle=line, marker="o", capsize=3, label=f"{endpoint}: {part}")
    axes.set(xlabel="tokens of the prefix", ylabel="ms of a call", xscale="log", yscale="log")
    prefixes = sorted({int(_number(row["prefix"])) for row in section.tables["calls"].rows})
    axes.set_xticks(prefixes, [f"{prefix:,}" for prefix in prefixes])
    axes.xaxis.set_minor_formatter(pyplot.NullFormatter())
    _plain_numbers(pyplot, axes.yaxis)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _gpu_model(pyplot: Any, section: Section) -> Any:
    """Tokens/s against streams, one panel for each pair, one line for each way to use it."""
    pairs = _grouped(section.tables["speed"].rows, itemgetter("pair"))
    figure, panels = pyplot.subplots(1, len(pairs), figsize=(5 * len(pairs), 4))
    for axes, (pair, rows) in zip(panels, pairs.items(), strict=True):
        for column in rows[0]:
            if column in ("pair", "streams", "running", "drafts"):
                continue
            line = "-" if column.startswith("cooperation") else "--"
            axes.plot(_numbers(rows, "streams"), _numbers(rows, column), line, marker="o", label=column)
        axes.set(xlabel="streams", title=pair, xscale="log", yscale="log")
        _plain_numbers(pyplot, axes.xaxis, base=2)
        _plain_numbers(pyplot, axes.yaxis)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("tokens/s")
    panels[-1].legend(bbox_to_anchor=(1.01, 1), loc="upper left", fontsize=8)
    return figure


def _streams(pyplot: Any, lines: Mapping[str, Sequence[Row]]) -> Any:
    """Tokens/s against streams, with the range over the rounds."""
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for label, rows in lines.items():
        x = _numbers(rows, "streams")
        y = _numbers(rows, "tokens/s")
        axes.errorbar(x, y, _ranges(rows, "tokens/s"), marker="o", capsize=3, label=label)
    axes.set(xlabel="streams", ylabel="tokens/s", xscale="log", yscale="log")
    _plain_numbers(pyplot, axes.xaxis, base=2)
    _plain_numbers(pyplot, axes.yaxis)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _plain_numbers(pyplot: Any, axis: Any, base: int = 10) -> None:
    """Label a logarithmic axis with 50, 100, 200 instead of powers."""
    axis.set_major_locator(pyplot.LogLocator(base, subs=(1, 2, 5) if base == 10 else (1,)))
    axis.set_major_formatter("{x:,.0f}")
    axis.set_minor_formatter(pyplot.NullFormatter())


DRAWN: Mapping[str, Callable[[Any, Section], Any]] = {
    "speculative": _points,
    "cooperation": _shares,
    "capacity": _capacity,
    "overhead": _overhead,
    "teacher-call": _teacher_call,
    "gpu-model": _gpu_model,
}


def _kind(row: Row) -> str:
    """Kind of a row's side; all sides of a kind have the same marker."""
    return str(row["side"]).partition(", ")[0]


def _detail(row: Row) -> str:
    """The part of a side's name that tells it from others of its kind."""
    return str(row["side"]).partition(", ")[2]


def _number(value: Value) -> float:
    if isinstance(value, Spread):
        return value.median
    return math.nan if value is None else float(value)


def _numbers(rows: Sequence[Row], column: str) -> NDArray[np.float64]:
    return np.array([_number(row[column]) for row in rows])


def _ranges(rows: Sequence[Row], column: str) -> NDArray[np.float64]:
    """Distances of the lowest and of the highest measurement from the median: (2, rows)."""
    spreads = [value for value in (row[column] for row in rows) if isinstance(value, Spread)]
    if len(spreads) < len(rows):
        return np.zeros((2, len(rows)))
    return np.array([[value.median - value.low, value.high - value.median] for value in spreads]).T


def _grouped(rows: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups
