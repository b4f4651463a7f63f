"""Commands of `wheels`, called in this process: arguments in, exit status out."""

from collections.abc import Sequence

import wheels

INTERRUPTED = 130
"""Exit status after Ctrl-C."""


def train(argv: Sequence[str]) -> int:
    return wheels.main(["train", *argv])


def evaluate(argv: Sequence[str]) -> int:
    return wheels.main(["evaluate", *argv])
