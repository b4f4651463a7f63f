"""No two modules import each other, directly or through others, whatever the import is for."""

import ast
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.sources import PACKAGES, parsed, statements


def name_of(source: Path) -> str:
    parts = source.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.Module, modules: Collection[str]) -> set[str]:
    """The modules that a file imports: at its top, inside functions, or for types only."""
    names: list[str] = []
    for node in statements(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [name if name in modules else node.module for name in inner]
    return {name for name in names if name in modules}


def circles(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of modules in which each module needs all others."""
    needed = {module: _reached(imports, module) for module in imports}
    found = {
        tuple(sorted(other for other in others if module in needed[other]))
        for module, others in needed.items()
        if module in others
    }
    return [list(circle) for circle in sorted(found)]


def _reached(imports: Mapping[str, set[str]], start: str) -> set[str]:
    """All modules that a module reaches through imports."""
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        new = imports[waiting.pop()] - reached
        reached |= new
        waiting += new
    return reached


def test_no_modules_import_each_other() -> None:
    sources = {name_of(source): source for package in PACKAGES for source in (ROOT / package).rglob("*.py")}
    imports = {module: imported(parsed(source), sources) for module, source in sources.items()}
    assert sum(map(len, imports.values())) > len(sources)  # imports are found at all
    assert circles(imports) == []


@pytest.mark.parametrize(
    "text",
    [
        "import shop.till",
        "from shop.till import Till",
        "from shop import till",
        "if TYPE_CHECKING:\n    from shop.till import Till",
        "def pay():\n    from shop.till import Till",
        "class Pay:\n    def by_card(self):\n        if self.card:\n            import shop.till",
    ],
)
def test_an_import_counts_wherever_it_is(text: str) -> None:
    assert imported(ast.parse(text), {"shop", "shop.till"}) == {"shop.till"}


def test_all_modules_of_a_circle_are_named() -> None:
    """`a`, `b` and `c` need each other. No module needs `d`, which needs them. `e` needs itself."""
    imports = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"e"}}
    assert circles(imports) == [["a", "b", "c"], ["e"]]
