"""One tree of exceptions: its drawing is complete, and each error becomes one line and a status."""

import ast
import builtins
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import pytest

import router.errors
import wheels
from router.checkpoint import CheckpointError
from router.errors import BadRequest, RunEnded, UnusableInput, WheelsError
from server.http.errors import ApiError
from server.teacher.errors import TeacherError
from server.tenants import BudgetRefused
from tests.helpers.paths import ROOT
from tests.helpers.sources import PACKAGES, parsed, statements
from training.export import ExportError
from training.loop.stopping import Stopped

INDENT = 4


class Definition(NamedTuple):
    name: str
    bases: tuple[str, ...]


def definitions() -> Iterator[Definition]:
    """Every class of the project."""
    files = [ROOT / "wheels.py"]
    for package in PACKAGES:
        files += (ROOT / package).rglob("*.py")
    for file in files:
        for node in statements(parsed(file)):
            if isinstance(node, ast.ClassDef):
                yield Definition(node.name, tuple(ast.unparse(base).split(".")[-1] for base in node.bases))


def is_builtin_error(name: str) -> bool:
    found = getattr(builtins, name, None)
    return isinstance(found, type) and issubclass(found, BaseException)


@cache
def exceptions() -> dict[str, str]:
    """The public exceptions of the project, and the first base of each."""
    parents: dict[str, str] = {}
    found = list(definitions())
    for _ in found:  # as often as the tree can be deep
        before = len(parents)
        for name, bases in found:
            if bases and (bases[0] in parents or any(map(is_builtin_error, bases))):
                parents[name] = bases[0]
        if len(parents) == before:
            break
    return {name: parent for name, parent in parents.items() if not name.startswith("_")}


def drawn() -> dict[str, str]:
    """The exceptions and their bases, as the docstring draws them."""
    parents: dict[str, str] = {}
    above: list[str] = []
    for line in (router.errors.__doc__ or "").splitlines():
        branch = re.match(r"((?:│   |    )*)[├└]── (\w+)", line)
        if branch:
            depth = len(branch[1]) // INDENT + 1
            del above[depth:]
            parents[branch[2]] = above[-1]
            above.append(branch[2])
        elif line == "WheelsError":
            parents[line] = "Exception"
            above = [line]
    return parents


def test_the_drawn_tree_has_all_exceptions_and_their_bases():
    assert exceptions() == drawn()


def test_a_new_exception_would_be_noticed():
    assert "WheelsError" in drawn()
    assert len(drawn()) == len(exceptions()) > 20


@pytest.mark.parametrize("command", wheels.COMMANDS)
def test_an_error_is_one_line_with_the_commands_name(command, monkeypatch, capsys):
    failing = wheels.COMMANDS[command]._replace(target=f"{__name__}:fails")
    monkeypatch.setitem(wheels.COMMANDS, command, failing)
    usual = 2 if command in ("train", "evaluate") else 1
    for error, status in [
        (UnusableInput("no"), usual),
        (CheckpointError("no"), usual),
        (TeacherError("timeout", "no"), usual),
        (RunEnded("no"), 1),
        (ExportError("no"), 1),
        (Stopped("no"), 130),
    ]:
        monkeypatch.setattr(f"{__name__}.ERROR", error)
        assert wheels.main([command]) == status
        assert capsys.readouterr().err == f"wheels {command}: no\n"


ERROR: Exception = WheelsError("no")


def fails(argv: list[str]) -> int:
    raise ERROR


def test_notes_follow_the_line(monkeypatch, capsys):
    monkeypatch.setitem(wheels.COMMANDS, "bench", wheels.Command(f"{__name__}:fails", "for this test"))
    error = WheelsError("no")
    error.add_note("Logs: there")
    monkeypatch.setattr(f"{__name__}.ERROR", error)
    assert wheels.main(["bench"]) == 1
    assert capsys.readouterr().err == "wheels bench: no\nLogs: there\n"


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setitem(wheels.COMMANDS, "bench", wheels.Command(f"{__name__}:fails", "for this test"))
    monkeypatch.setattr(f"{__name__}.ERROR", ZeroDivisionError("a fault of ours"))
    with pytest.raises(ZeroDivisionError):
        wheels.main(["bench"])


@pytest.mark.parametrize("kind", [BadRequest, BudgetRefused])
def test_a_client_is_told_the_parameter(kind):
    assert ApiError.of(kind("teacher_budget", "too much")) == ApiError(400, "too much", "teacher_budget")
