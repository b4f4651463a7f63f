"""The data set `synopses`: descriptions of Debian packages, and the synopsis of each; people wrote both."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from training.fetch.apt import Package

LEFT_OUT = re.compile(r"-(dev|doc|data|common|dbg)$")
"""Names of packages to leave out, because their descriptions repeat that of another package."""
DESCRIPTION = range(120, 1201)
"""Lengths of a description, in characters."""
SYNOPSIS = range(20, 81)
"""Lengths of a synopsis, in characters."""
BEGINNING = 80
"""Number of first characters by which two descriptions count as the same."""
HELD_OUT = 1000
"""Number of validation examples, and of test examples."""
ABOUT = """The description of a Debian package, and its synopsis of one line; people wrote both.

From the package index of Debian, read through apt. One package of each source package, none of -dev, -doc,
-data, -common or -dbg. Descriptions have 120 to 1,200 characters, synopses 20 to 80. A synopsis, or the first
80 characters of a description, that came before is left out. The order is that of a hash of the source
package's name, so that an example stays in its file when the index grows.

The texts are under the licences of their packages, which are all free.
"""


class Synopsis(NamedTuple):
    """An example: a description as its source, and the synopsis as its target."""

    source: str
    target: str


class SynopsisSplits(NamedTuple):
    """The files of a data set."""

    train: list[Synopsis]
    valid: list[Synopsis]
    test: list[Synopsis]


def synopses(packages: Iterable[Package]) -> SynopsisSplits:
    """Training, validation and test examples, always in the same order."""
    shuffled = sorted(distinct(sorted(packages)), key=lambda package: _digest(package.source))
    examples = [Synopsis(joined(package.description), package.synopsis) for package in shuffled]
    return SynopsisSplits(
        train=examples[2 * HELD_OUT :], valid=examples[:HELD_OUT], test=examples[HELD_OUT : 2 * HELD_OUT]
    )


def distinct(packages: Iterable[Package]) -> Iterator[Package]:
    """One package of each source package, without texts that an earlier package has."""
    sources: set[str] = set()
    texts: set[str] = set()
    for package in packages:
        description = joined(package.description)
        if LEFT_OUT.search(package.name):
            continue
        if len(description) not in DESCRIPTION or len(package.synopsis) not in SYNOPSIS:
            continue
        own = {f"synopsis {package.synopsis}", f"description {description[:BEGINNING]}"}
        if package.source in sources or texts & own:
            continue
        sources.add(package.source)
        texts |= own
        yield package


def joined(description: str) -> str:
    """The description in one line; a line with only a dot is Debian's empty line."""
    words = []
    for line in description.splitlines():
        if line.strip() != ".":
            words += line.split()
    return " ".join(words)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
