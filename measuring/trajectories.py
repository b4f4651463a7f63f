"""Completions of student and teacher as token ids, which gateways record and routers learn from."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from measuring.json_lines import DataError

SUFFIX = ".jsonl"


class Trajectory(msgspec.Struct, frozen=True, omit_defaults=True):
    """One completion, with its prompt and the teacher's spans."""

    prompt: list[int]
    """Token ids of the prompt, as the student read them."""
    tokens: list[int]
    """Token ids of the completion."""
    spans: list[tuple[int, int]] = []
    """[start, end) token offsets of the teacher's spans."""
    budget: float | None = None
    """The request's budget as a fraction of completion tokens; None: a budget of another kind."""

    @property
    def by_teacher(self) -> list[bool]:
        """For each token, whether the teacher wrote it."""
        return within(self.spans, len(self.tokens))


class TrajectoryFile:
    """A file of trajectories, one on each line, that takes more until it is full.

    A line is written at once. A killed process may leave an unfinished one. Nobody reads it, and the next
    process that writes into the file cuts it off.

    Args:
        file: path of the file, which the first trajectory creates; an existing file is continued.
        max_bytes: largest size of the file; trajectories that do not fit are dropped.

    Raises:
        OSError: the file exists and cannot be written.
    """

    def __init__(self, file: Path, max_bytes: int) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self._bytes = _whole_lines(file)
        self._encoder = msgspec.json.Encoder()

    def add(self, trajectory: Trajectory) -> bool:
        """Append a trajectory; False if the file has no room for it.

        Raises:
            OSError: the file cannot be written.
        """
        line = self._encoder.encode(trajectory) + b"\n"
        if self._bytes + len(line) > self._max_bytes:
            return False
        with self._file.open("ab") as stream:
            stream.write(line)
        self._bytes += len(line)
        return True


def _whole_lines(file: Path) -> int:
    """Cut off an unfinished last line; returns the bytes of the whole lines."""
    if not file.exists():
        return 0
    with file.open("r+b") as stream:
        length = stream.read().rfind(b"\n") + 1
        stream.truncate(length)
    return length


def read_trajectories(directory: Path) -> Iterator[Trajectory]:
    """All trajectories of a directory's files, in the order of their names.

    Raises:
        DataError: there is no file, or a line is not a trajectory; the message names file and line.
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
    """Raises DataError if prompt or completion is empty, or the spans do not fit the completion."""
    if not trajectory.prompt or not trajectory.tokens:
        raise DataError(f"{place}: prompt or completion has no token")
    if not in_order(trajectory.spans, len(trajectory.tokens)):
        raise DataError(f"{place}: the spans {trajectory.spans} do not fit the completion")


def in_order(spans: Sequence[tuple[int, int]], tokens: int) -> bool:
    """Whether spans [start, end) are in order, do not overlap, and end within this many tokens."""
    written = 0
    for start, end in spans:
        if not written <= start <= end <= tokens:
            return False
        written = end
    return True


def within(spans: Sequence[tuple[int, int]], tokens: int) -> list[bool]:
    """For each of a completion's tokens, whether it is in one of the spans [start, end)."""
    flags = [False] * tokens
    for start, end in spans:
        flags[start:end] = [True] * (end - start)
    return flags


def file_of(directory: Path) -> Path:
    """The file that this process writes: several gateways may record into one directory."""
    return directory / f"{os.uname().nodename}-{os.getpid()}{SUFFIX}"
