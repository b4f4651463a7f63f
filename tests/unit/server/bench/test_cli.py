"""The output of `wheels bench`, and the arguments that it refuses."""

import json
import math
from pathlib import Path

import pytest

import wheels
from measuring.pair import Pair
from server.bench import cli
from server.bench.results import Section, Spread, Table, number
from server.local.arguments import bare_pair


def test_a_section_as_json_and_as_markdown() -> None:
    rows = [{"server": "a", "tokens/s": Spread.from_values([3.0, 1.0, 2.0]), "added ms": None}]
    section = Section({"main": Table("Title", rows, "About.")}, ["a note"], {"cpu": "c"})
    stored = json.loads(json.dumps(section.as_dict()))
    assert stored["tables"]["main"]["rows"][0]["tokens/s"] == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert stored["machine"] == {"cpu": "c"}
    assert "| a | 2.00 (1.00–3.00) | – |" in section.markdown("x")


def test_numbers_are_printed_with_three_digits() -> None:
    assert [number(x) for x in (0.01234, 1.234, 12.34, 1234.5, 0.0)] == [
        "0.012",
        "1.23",
        "12.3",
        "1,234",
        "0",
    ]


def test_an_empty_measurement_has_no_spread() -> None:
    with pytest.raises(ValueError, match="no measurement"):
        Spread.from_values([])
    assert not math.isnan(Spread.from_values([1.0]).median)


def test_a_missing_pair_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert wheels.main(["bench", str(tmp_path), "--quick"]) == 1
    assert str(tmp_path / "teacher") in capsys.readouterr().err


def test_a_pair_may_have_neither_router_nor_examples(tmp_path: Path) -> None:
    for name in ("teacher", "student"):
        (tmp_path / name).mkdir()
    assert bare_pair(tmp_path) == Pair(tmp_path / "teacher", tmp_path / "student", None)
    (tmp_path / "router").mkdir()
    assert bare_pair(tmp_path).router == tmp_path / "router"


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--section", "speed"])
    assert "invalid choice: 'speed'" in capsys.readouterr().err


def test_an_interpreter_for_a_section_that_does_not_run_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        wheels.main(["bench", "--section", "gate", "--litellm", "python"])
    assert "--litellm is for the section peers" in capsys.readouterr().err
