"""The `wheels` command: its output and exit status, and its speed."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import wheels


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "wheels", *arguments], capture_output=True, text=True, timeout=60
    )


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert wheels.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in wheels.COMMANDS.items():
        assert f"  {name}" in text
        assert command.summary in text


def test_help_takes_milliseconds() -> None:
    """The test measures processor time: the wall clock also measures other work of the machine."""
    before = os.times()
    assert run("--help").returncode == 0
    assert os.times().children_user - before.children_user < 0.5


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert wheels.main(["--version"]) == 0
    assert capsys.readouterr().out == f"wheels {version('training-wheels')}\n"


@pytest.mark.parametrize(
    ("arguments", "problem"), [(("fly",), "unknown command 'fly'"), ((), "no command given")]
)
def test_a_usage_error_is_one_line_and_status_2(arguments: tuple[str, ...], problem: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert problem in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", wheels.COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        wheels.main([name, "--help"])
    assert exit.value.code == 0
    assert f"usage: wheels {name}" in capsys.readouterr().out


def test_the_rest_of_the_line_reaches_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(wheels.COMMANDS, "echo", wheels.Command(f"{__name__}:echo", "for this test"))
    assert wheels.main(["echo", "one", "--two"]) == 2


def echo(argv: list[str]) -> int:
    assert argv == ["one", "--two"]
    return len(argv)


def test_ctrl_c_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(wheels.COMMANDS, "stop", wheels.Command(f"{__name__}:interrupted", "for this test"))
    assert wheels.main(["stop"]) == 130


def interrupted(argv: list[str]) -> int:
    raise KeyboardInterrupt


def test_demo_says_which_checkpoint_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert wheels.main(["demo", "--once", "--pair", str(tmp_path)]) == 1
    assert str(tmp_path / "teacher") in capsys.readouterr().err


def test_serve_names_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert wheels.main(["serve", "--teacher", "http://127.0.0.1:9"]) == 1
    assert "student" in capsys.readouterr().err
