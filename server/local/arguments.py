"""Command-line arguments that the demo and the benchmarks share."""

import argparse
from pathlib import Path

from server.local.pair import Pair

SHIPPED_PAIR = Path(__file__).resolve().parents[2] / "deploy" / "demo"
PAIR_HELP = "directory with teacher/, student/, router/ and examples.jsonl (default: the shipped pair)"
EXAMPLES = "examples.jsonl"


def positive(text: str) -> int:
    """A number of 1 or more, as argparse's ``type``."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def missing_files(directory: Path) -> str:
    """What a pair's directory lacks, separated by commas; empty if it is complete."""
    missing = Pair.in_directory(directory).missing()
    if not (directory / EXAMPLES).exists():
        missing.append(directory / EXAMPLES)
    return ", ".join(map(str, missing))
