"""`wheels fetch DATASET DIRECTORY`: writes `{train,valid,test}.jsonl` for the task `jsonl`."""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from training.fetch.apt import FetchError, debian_packages
from training.fetch.synopses import ABOUT, SynopsisSplits, synopses


class Dataset(NamedTuple):
    """A data set that can be fetched."""

    fetch: Callable[[], SynopsisSplits]
    """Fetches the examples of all splits."""
    about: str
    """Its source, its rules and its licence, written to a file next to the data."""


DATASETS = {"synopses": Dataset(lambda: synopses(debian_packages()), ABOUT)}


def main(argv: list[str]) -> int:
    """Run `wheels fetch`.

    Raises:
        FetchError: the data cannot be fetched, or the directory exists.
    """
    arguments = fetch_parser().parse_args(argv)
    directory: Path = arguments.directory
    if directory.exists():
        raise FetchError(f"{directory} exists already")
    dataset = DATASETS[arguments.dataset]
    splits = dataset.fetch()
    write(splits, dataset.about, directory)
    sizes = [f"{len(examples):,} {name}" for name, examples in splits._asdict().items()]
    print(f"{directory}: {', '.join(sizes)}")
    return 0


def fetch_parser() -> argparse.ArgumentParser:
    """The parser of the arguments of `wheels fetch`."""
    parser = argparse.ArgumentParser("wheels fetch", description="Create a data set from a public source.")
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument(
        "directory", type=Path, help="directory to create for the data; it must not exist yet"
    )
    return parser


def write(splits: SynopsisSplits, about: str, directory: Path) -> None:
    """Write the files of a data set to a directory, which appears all at once."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
        finished = Path(scratch) / "finished"
        finished.mkdir()
        for name, examples in splits._asdict().items():
            lines = [json.dumps(example._asdict(), ensure_ascii=False) + "\n" for example in examples]
            (finished / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        (finished / "README.txt").write_text(about, encoding="utf-8")
        finished.rename(directory)
