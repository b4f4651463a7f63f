"""Prompts from a file: JSON lines, or a prompt on each line of plain text."""

import codecs
from pathlib import Path

from measuring.chats import Source, source_of, turns
from measuring.json_lines import DataError, Row, read_json_lines

TEXT_SUFFIX = ".txt"


def load_prompts(file: Path) -> list[Source]:
    """The prompts of a file, in order; at least one.

    A file whose first character is ``{`` holds JSON lines: objects with `messages`, else a `source`, else a
    `prompt`. Other fields are ignored. Any other file, and every ``.txt`` file, is text with a prompt on each
    line that is not blank.

    Raises:
        DataError: the file or a line of it cannot be used.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error
    prompts: list[Source] = []
    if file.suffix != TEXT_SUFFIX and content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
        for row in read_json_lines(file):
            prompts.append(_prompt(row))
    else:
        prompts += _lines(file, content)
    if not prompts:
        raise DataError(f"{file}: has no prompt")
    return prompts


def _prompt(row: Row) -> Source:
    if "messages" in row.fields or "source" in row.fields:
        return source_of(row)
    value = row.fields.get("prompt")
    if value is None:
        raise row.error("has no 'messages', 'source' or 'prompt'")
    if isinstance(value, str):
        return row.text("prompt")
    try:
        return turns(value)
    except DataError as error:
        raise row.error(f"'prompt' is neither a text nor a conversation: {error}") from error


def _lines(file: Path, content: bytes) -> list[str]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 (byte {error.start + 1}: {error.reason})") from error
    lines = []
    for line in text.split("\n"):
        if line.strip():
            lines.append(line.strip())
    return lines
