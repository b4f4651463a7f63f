"""Plots of benchmark sections."""

from pathlib import Path

import pytest

from server.bench.plots import plot
from server.bench.results import Row, Section, Spread, Table

pytest.importorskip("matplotlib")


def rows(group: str, names: tuple[str, str]) -> list[Row]:
    return [
        {
            group: name,
            "streams": streams,
            "tokens/s": Spread(100.0 * streams, 90.0 * streams, 120.0 * streams),
        }
        for name in names
        for streams in (1, 8, 64)
    ]


@pytest.mark.parametrize(
    ("name", "table", "lines"),
    [
        ("overhead", "client", rows("server", ("gateway", "vLLM"))),
        ("capacity", "streams", rows("budget", ("0", "0.1"))),
    ],
)
def test_throughput_is_drawn_against_streams(name: str, table: str, lines: list[Row], tmp_path: Path) -> None:
    assert plot(name, Section({table: Table("", lines)}), tmp_path) == [tmp_path / f"{name}.png"]


def test_every_way_to_use_a_pair_is_drawn(tmp_path: Path) -> None:
    """Cooperation on a core each and cooperation on shared cores are separate lines."""
    sides = ("student alone", "cooperation, 0.1", "cooperation on both cores, 0.1", "speculative, 4 drafts")
    points = [
        {"side": side, "exact match": 0.9, "tokens/s, 1": 100.0, "tokens/s, 16": 200.0} for side in sides
    ]
    section = Section({"points": Table("", points)})
    assert plot("speculative", section, tmp_path) == [tmp_path / "speculative.png"]


def test_a_teacher_call_is_drawn_by_its_prefix(tmp_path: Path) -> None:
    calls: list[Row] = []
    for endpoint in ("completions", "token ids"):
        for prefix in (100, 1000):
            parts = {"teacher's front end": Spread(10.0, 9.0, 12.0), "gateway": Spread(1.0, 1.0, 1.0)}
            calls.append({"prefix": prefix, "endpoint": endpoint, **parts})
    section = Section({"calls": Table("", calls)})
    assert plot("teacher-call", section, tmp_path) == [tmp_path / "teacher-call.png"]


def test_a_section_without_a_picture_writes_none(tmp_path: Path) -> None:
    assert plot("peers", Section({}), tmp_path) == []
    assert list(tmp_path.iterdir()) == []
