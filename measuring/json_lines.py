"""The only reader of data files: JSON lines, with errors that name the file and line."""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from router.errors import UnusableInput


class DataError(UnusableInput, ValueError):
    """Data cannot be used. The message is one line and names the file and the line, if there is one."""


@dataclass(frozen=True)
class Row:
    """One line of a file, a JSON object."""

    file: Path
    number: int
    """Number of the line, from 1."""
    fields: dict[str, Any]

    def text(self, name: str) -> str:
        """The string in a field.

        Raises:
            DataError: the field is missing, is not a string, or holds half of a surrogate pair.
        """
        if name not in self.fields:
            raise self.error(f"has no {name!r}")
        value = self.fields[name]
        if not isinstance(value, str):
            raise self.error(f"{name!r} is {_kind(value)}, not a string")
        if not is_text(value):
            raise self.error(f"{name!r} holds half of a surrogate pair, which is not a character")
        return value

    def error(self, problem: str) -> DataError:
        """An error for the caller to raise; its message names the file and this line."""
        return DataError(f"{self.file}:{self.number}: {problem}")


def read_json_lines(file: Path) -> list[Row]:
    """All lines of a file, one JSON object each. Blank lines at its end are allowed.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object in UTF-8.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error
    if content.startswith(codecs.BOM_UTF8):
        raise DataError(f"{file}:1: starts with a byte order mark; save the file as UTF-8 without one")
    lines = content.rstrip().split(b"\n")  # not splitlines: U+2028 may be inside a JSON string
    return [] if lines == [b""] else list(_rows(file, lines))


def read_some_json_lines(file: Path) -> list[Row]:
    """All lines of a file, as `read_json_lines` reads them; at least one.

    Raises:
        DataError: the file is empty or cannot be read, or a line is not a JSON object in UTF-8.
    """
    rows = read_json_lines(file)
    if not rows:
        raise DataError(f"{file}: is empty")
    return rows


def is_text(value: str) -> bool:
    """Whether a string holds no half of a surrogate pair, which UTF-8 cannot encode."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _rows(file: Path, lines: list[bytes]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        try:
            value = _parsed(line)
        except DataError as error:
            raise DataError(f"{file}:{number}: {error}") from error
        yield Row(file, number, value)


def _parsed(line: bytes) -> dict[str, Any]:
    if not line.strip():
        raise DataError("is blank")
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_refused)
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 (byte {error.start + 1}: {error.reason})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"is not JSON ({error.msg} at character {error.pos + 1})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON that can be read ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"is {_kind(value)}, not an object")
    return value


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON value")


def _kind(value: object) -> str:
    """The value's type, as JSON names it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, list) else "an object"
