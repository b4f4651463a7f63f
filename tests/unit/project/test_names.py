"""A name means one thing: no two classes of the packages share theirs."""

import ast
from collections import defaultdict

from tests.helpers.paths import ROOT
from tests.helpers.sources import PACKAGES, parsed, statements


def test_no_two_classes_share_a_name() -> None:
    """Private classes do not count: nobody sees them outside their file."""
    places: defaultdict[str, list[str]] = defaultdict(list)
    for package in PACKAGES:
        for source in (ROOT / package).rglob("*.py"):
            for node in statements(parsed(source)):
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places[node.name].append(str(source.relative_to(ROOT)))
    assert len(places) > 100  # classes are found at all
    assert {name: files for name, files in places.items() if len(files) > 1} == {}
