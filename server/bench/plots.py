"""Pictures of sections: from their tables alone, so that a stored result can be drawn again."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from server.bench.results import Row, Section, Spread

DPI = 120
MARKERS = {
    "student alone": "s",
    "teacher alone": "D",
    "speculative": "^",
    "cooperation": "o",
}


def plot(name: str, section: Section, directory: Path) -> list[Path]:
    """Write a section's pictures; nothing for one that has none, or where matplotlib is missing."""
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
        for kind, marker in MARKERS.items():
            group = [row for row in rows if _kind(str(row["side"])) == kind]
            if not group:  # left out of this run
                continue
            below = {"xytext": (-3, -5), "ha": "right", "va": "top"}
            place = below if kind.startswith("cooperation") else {"xytext": (0, 6)}
            x = [_middle(row[column]) for row in group]
            y = [100 * _middle(row["exact match"]) for row in group]
            axes.plot(x, y, marker, linestyle="-" if kind.startswith("cooperation") else "", label=kind)
            for row, at in zip(group, zip(x, y, strict=True), strict=True):
                label = str(row["side"]).partition(", ")[2]
                axes.annotate(label, at, textcoords="offset points", fontsize=7, rotation=60, **place)
        streams = column.rpartition(" ")[2]
        axes.set(xlabel="tokens/s", title=f"{streams} stream{'s' * (streams != '1')}", xscale="log")
        axes.grid(alpha=0.3)
        axes.margins(0.1, 0.2)
        axes.tick_params(axis="x", which="minor", labelbottom=False)
    panels[0].set_ylabel("exact match, %")
    panels[0].legend(loc="lower left")
    return figure


def _shares(pyplot: Any, section: Section) -> Any:
    """Where a request's time goes, one bar for each side and number of streams."""
    rows = section.tables["split"].rows
    parts = [column for column in rows[0] if column not in ("streams", "side")]
    labels = [f"{row['streams']} × {str(row['side']).partition(', ')[2]}" for row in rows]
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(rows) + 1))
    left = [0.0] * len(rows)
    for index, part in enumerate(parts):
        widths = [max(0.0, _middle(row[part])) for row in rows]
        axes.barh(labels, widths, left=left, label=part, color=pyplot.colormaps["tab20"](index))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set(xlabel="share of the requests' time", ylabel="streams × budget", xlim=(0, 1))
    axes.invert_yaxis()
    axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left", fontsize=8)
    return figure


def _streams(pyplot: Any, section: Section) -> Any:
    """Tokens/s against streams, one line for each budget."""
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for budget, rows in _grouped(section.tables["streams"].rows, "budget").items():
        x = [row["streams"] for row in rows]
        axes.plot(x, [_middle(row["tokens/s"]) for row in rows], marker="o", label=f"budget {budget}")
    axes.set(xlabel="streams", ylabel="tokens/s", xscale="log", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


DRAWN: Mapping[str, Callable[[Any, Section], Any]] = {
    "speculative": _points,
    "cooperation": _shares,
    "capacity": _streams,
}


def _kind(side: str) -> str:
    """Sides of one kind have one marker."""
    return side.partition(", ")[0]


def _middle(value: Any) -> float:
    return value.median if isinstance(value, Spread) else float(value)


def _grouped(rows: Sequence[Row], column: str) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[column], []).append(row)
    return groups
