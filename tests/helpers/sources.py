"""The project's Python files, with their docstrings and comments. Each file is read once."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.helpers.paths import ROOT

PACKAGES = ("server", "router", "training", "measuring")
SOURCES = [path for package in (*PACKAGES, "tests") for path in sorted((ROOT / package).rglob("*.py"))]
# Python's own tokenizer would take half of the time of all tests of the project.
STRING_OR_COMMENT = re.compile(
    r"(?s:(?P<quotes>\"{3}|'{3})(?:\\.|.)*?(?P=quotes))"
    r"|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'"
    r"|(?P<comment>#[^\n]*)",
)


def statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Every statement below a node, in the order of the text. Expressions would take far longer."""
    for part in ("body", "handlers", "orelse", "finalbody", "cases"):
        for inner in getattr(node, part, ()):
            if isinstance(inner, ast.stmt):
                yield inner
            yield from statements(inner)


@cache
def parsed(source: Path) -> ast.Module:
    """The syntax tree of a file of the project; callers must not change it."""
    return ast.parse(source.read_text())


@cache
def docstrings(source: Path) -> tuple[str, ...]:
    """A file's docstrings, and the texts below fields."""
    return tuple(
        statement.value.value
        for statement in statements(parsed(source))
        if isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


@cache
def comments(source: Path) -> tuple[str, ...]:
    found = STRING_OR_COMMENT.finditer(source.read_text())
    return tuple(match["comment"] for match in found if match["comment"])


def docstrings_and_comments(source: Path) -> str:
    return "\n".join([*comments(source), *docstrings(source)])
