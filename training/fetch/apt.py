"""Reads Debian's package index through apt, with apt's sources and keys, in a folder that needs no root."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from router.errors import UnusableInput

SECONDS = 900
"""Longest time for the download of the index, which has 16 MB."""
ORIGIN = "Debian"
COMPONENT = "main"
"""Component with free packages only."""
TARGETS = "$(CREATED_BY)\t$(ORIGIN)\t$(COMPONENT)\t$(CODENAME)\t$(FILENAME)"


class FetchError(UnusableInput):
    """Data cannot be fetched; the message is one line and names the problem."""


class Package(NamedTuple):
    """A package as the index describes it."""

    name: str
    source: str
    """Name of the source package that it is built from."""
    synopsis: str
    """Its short description, of one line."""
    description: str
    """Its long description, with the line breaks of the index."""


class IndexFiles(NamedTuple):
    """The files in which apt keeps the index of one release."""

    release: str
    """Codename of the release."""
    packages: Path
    """File of the packages."""
    translation: Path
    """File of the English descriptions."""


def debian_packages() -> list[Package]:
    """All packages of this machine's Debian and architecture, each from the first release that has it.

    Raises:
        FetchError: apt is not installed, its sources name no Debian, or the download fails.
    """
    if shutil.which("apt-get") is None:
        raise FetchError("apt-get is not installed; it is needed to read Debian's package index")
    with updated_index() as files:
        if not files:
            raise FetchError(f"apt has no source of {ORIGIN} with the component {COMPONENT}")
        found: dict[str, Package] = {}
        for file in files:
            for package in read_packages(file):
                found.setdefault(package.name, package)
    return list(found.values())


@contextmanager
def updated_index() -> Iterator[list[IndexFiles]]:
    """The files of a fresh index, for each release; they are deleted after the block."""
    with tempfile.TemporaryDirectory(prefix="wheels-apt-") as scratch:
        for folder in ("lists/partial", "cache/archives/partial"):
            (Path(scratch) / folder).mkdir(parents=True)
        Path(scratch).chmod(0o755)  # apt downloads as a user of its own if it is started by root
        options = [
            f"Dir::State::lists={scratch}/lists",
            f"Dir::Cache={scratch}/cache",
            "Acquire::Languages=en",
            "Acquire::GzipIndexes=false",
        ]
        _apt(options, "update", "--error-on=any")
        yield index_files(_apt(options, "indextargets", "--format", TARGETS))


def index_files(targets: str) -> list[IndexFiles]:
    """The index files of every release, by name, from the table that apt-get prints in format `TARGETS`."""
    files: dict[tuple[str, str], dict[str, Path]] = {}
    for line in targets.splitlines():
        kind, origin, component, release, file = line.split("\t")
        if origin == ORIGIN and component == COMPONENT:
            files.setdefault((release, str(Path(file).parent)), {}).setdefault(kind, Path(file))
    found = []
    for (release, _), by_kind in sorted(files.items()):
        if by_kind.keys() >= {"Packages", "Translations"}:
            found.append(IndexFiles(release, by_kind["Packages"], by_kind["Translations"]))
    return found


def read_packages(files: IndexFiles) -> Iterator[Package]:
    """All packages of one release that have an English description."""
    sources: dict[str, str] = {}
    for fields in paragraphs(files.packages):
        name = fields["Package"]
        sources[name] = fields.get("Source", name).split()[0]  # its version may follow
    for fields in paragraphs(files.translation):
        name = fields["Package"]
        synopsis, _, description = fields["Description-en"].partition("\n")
        if name in sources:
            yield Package(name, sources[name], synopsis, description)


def paragraphs(file: Path) -> Iterator[dict[str, str]]:
    """The fields of each paragraph in a file of Debian's control format; values keep their line breaks."""
    fields: dict[str, str] = {}
    name = ""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.isspace():
                if fields:
                    yield fields
                fields = {}
            elif line[0] in " \t":
                fields[name] += "\n" + line[1:].rstrip()
            else:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
    if fields:
        yield fields


def _apt(options: list[str], *arguments: str) -> str:
    """Run apt-get, and return what it prints. Raises FetchError with its last error line if it fails."""
    command = ["apt-get", "--quiet"]
    for option in options:
        command += ["-o", option]
    try:
        done = subprocess.run(
            [*command, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"apt-get {arguments[0]} took longer than {SECONDS} s") from error
    if done.returncode != 0:
        problem = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise FetchError(f"apt-get {arguments[0]}: {problem[-1]}")
    return done.stdout
