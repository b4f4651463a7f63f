"""Detects whether a file has changed since it was read."""

from pathlib import Path
from typing import NamedTuple


class FileState(NamedTuple):
    """State of a file. It differs if the file has changed, or if another file has replaced it."""

    modified_ns: int
    size: int
    inode: int

    @classmethod
    def of(cls, file: Path) -> "FileState":
        """The file's state now. Raises OSError if there is no such file."""
        stat = file.stat()
        return cls(stat.st_mtime_ns, stat.st_size, stat.st_ino)
