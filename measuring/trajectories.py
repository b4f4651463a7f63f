"""What student and teacher wrote together, as token ids: recorded by a gateway, learned from by a router."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from measuring.json_lines import DataError

SUFFIX = ".jsonl"


class Trajectory(msgspec.Struct, frozen=True, omit_defaults=True):
    """One completion, and who wrote it."""

    prompt: list[int]
    """Token ids, as the student read them."""
    tokens: list[int]
    """Of the completion."""
    spans: list[tuple[int, int]] = []
    """[start, end) of what the teacher wrote."""
    budget: float | None = None
    """The fraction of teacher tokens that the request could have; None: another kind of budget."""

    @property
    def by_teacher(self) -> list[bool]:
        """Who wrote each token."""
        return within(self.spans, len(self.tokens))


class TrajectoryFile:
    """One file of trajectories, a line each, that is written until it is full.

    A line is written whole. What a killed process left unfinished is not read, and cut off by the next that
    writes into the same file.

    Args:
        file: made when the first trajectory comes; what it holds already counts.
        max_bytes: of the file; what comes later is dropped.

    Raises:
        OSError: the file is there and cannot be written.
    """

    def __init__(self, file: Path, max_bytes: int) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self._bytes = _whole_lines(file)
        self._encoder = msgspec.json.Encoder()

    def add(self, trajectory: Trajectory) -> bool:
        """Whether there was room for it.

        Raises:
            OSError: it could not be written.
        """
        line = self._encoder.encode(trajectory) + b"\n"
        if self._bytes + len(line) > self._max_bytes:
            return False
        with self._file.open("ab") as stream:
            stream.write(line)
        self._bytes += len(line)
        return True


def _whole_lines(file: Path) -> int:
    """Bytes of a file's whole lines, to which it is cut."""
    if not file.exists():
        return 0
    with file.open("r+b") as stream:
        length = stream.read().rfind(b"\n") + 1
        stream.truncate(length)
    return length


def read_trajectories(directory: Path) -> Iterator[Trajectory]:
    """All trajectories of a directory's files, in the order of their names.

    Raises:
        DataError: there are none, or a line is none; the message names file and line.
    """
    files = sorted(directory.glob(f"*{SUFFIX}"))
    if not files:
        raise DataError(f"{directory}: holds no file {SUFFIX} of trajectories")
    decoder = msgspec.json.Decoder(Trajectory)
    for file in files:
        lines = file.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], start=1):  # the last is empty, or unfinished
            try:
                trajectory = decoder.decode(line)
            except msgspec.DecodeError as error:
                raise DataError(f"{file}:{number}: {error}") from error
            check(trajectory, f"{file}:{number}")
            yield trajectory


def check(trajectory: Trajectory, place: str) -> None:
    """Raises DataError unless it is a completion with spans in order."""
    if not trajectory.prompt or not trajectory.tokens:
        raise DataError(f"{place}: prompt or completion has no token")
    if not in_order(trajectory.spans, len(trajectory.tokens)):
        raise DataError(f"{place}: the spans {trajectory.spans} do not fit the completion")


def in_order(spans: Sequence[tuple[int, int]], tokens: int) -> bool:
    """Whether these are stretches of a completion of this many tokens, one after the other."""
    written = 0
    for start, end in spans:
        if not written <= start <= end <= tokens:
            return False
        written = end
    return True


def within(spans: Sequence[tuple[int, int]], tokens: int) -> list[bool]:
    """For each token of a completion whether it is in one of the spans [start, end)."""
    flags = [False] * tokens
    for start, end in spans:
        flags[start:end] = [True] * (end - start)
    return flags


def file_of(directory: Path) -> Path:
    """The file of this process: several gateways may record into one directory."""
    return directory / f"{os.uname().nodename}-{os.getpid()}{SUFFIX}"
