"""Command-line arguments that the demo and the benchmarks share."""

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from measuring.pair import Pair
from router.errors import UnusableInput

SHIPPED_PAIR = Path(__file__).resolve().parents[2] / "deploy" / "demo"
PAIR_HELP = "directory with teacher/, student/, router/ and examples.jsonl (default: the shipped pair)"
EXAMPLES = "examples.jsonl"


class IncompletePair(UnusableInput):
    """A pair's directory lacks a file; the message names it."""


def positive(text: str) -> int:
    """A whole number of 1 or more, for argparse's ``type``."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def complete_pair(directory: Path) -> Pair:
    """The pair in a directory.

    Raises:
        IncompletePair: a file is missing.
    """
    pair = Pair.in_directory(directory)
    missing = pair.missing()
    if not (directory / EXAMPLES).exists():
        missing.append(directory / EXAMPLES)
    _refuse(missing)
    return pair


def bare_pair(directory: Path) -> Pair:
    """The pair in a directory that may have neither a router nor examples.

    Raises:
        IncompletePair: a model is missing.
    """
    pair = Pair.in_directory(directory)
    if pair.router is not None and not pair.router.is_dir():
        pair = replace(pair, router=None)
    _refuse(pair.missing())
    return pair


def _refuse(missing: Iterable[Path]) -> None:
    names = ", ".join(map(str, missing))
    if names:
        raise IncompletePair(f"missing: {names}")
