"""Detects whether a file has changed since it was read."""

from pathlib import Path
from typing import NamedTuple


class FileState(NamedTuple):
    """Changes with the file, also if another one has taken its place."""

    modified_ns: int
    size: int
    inode: int

    @classmethod
    def of(cls, file: Path) -> "FileState":
        """The state now. Raises OSError if there is no such file."""
        stat = file.stat()
        return cls(stat.st_mtime_ns, stat.st_size, stat.st_ino)
