"""Prompts: a text, or a conversation of several turns."""

from typing import Any, NamedTuple, TypeAlias

from measuring.json_lines import DataError, Row, is_text
from router.words import turn_of_words

ROLES = ("system", "user", "assistant")


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    """One of `ROLES`."""
    content: str


Source: TypeAlias = str | tuple[Turn, ...]
"""A prompt: the text of a single user message, or a conversation that the model continues."""


def messages_of(source: Source) -> list[dict[str, str]]:
    """A prompt as the messages that OpenAI's API and chat templates take."""
    if isinstance(source, str):
        return [{"role": "user", "content": source}]
    return [turn._asdict() for turn in source]


def shown(source: Source) -> str:
    """A prompt as people see it: the text, or the content of the last turn."""
    return source if isinstance(source, str) else source[-1].content


def with_words(source: Source, words: str) -> Source:
    """A prompt with a budget in words, which are put before the turn of `router.words.turn_of_words`.

    A conversation without such a turn is returned unchanged.
    """
    if isinstance(source, str):
        return words + source
    place = turn_of_words([turn.role for turn in source])
    if place is None:
        return source
    turn = source[place]
    return (*source[:place], Turn(turn.role, words + turn.content), *source[place + 1 :])


def turns(value: Any) -> tuple[Turn, ...]:
    """A conversation, from a list of `{"role": …, "content": …}`.

    Raises:
        DataError: the value is not such a list; the message names the turn.
    """
    if not isinstance(value, list) or not value:
        raise DataError("'messages' is not a list of turns")
    found = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise DataError(f"turn {number} of 'messages' is not an object with role and content")
        role = message.get("role")
        content = message.get("content")
        if role not in ROLES:
            raise DataError(
                f"turn {number} of 'messages': the role is {role!r}, expected one of {', '.join(ROLES)}"
            )
        if not isinstance(content, str) or not is_text(content):
            raise DataError(f"turn {number} of 'messages': the content is not text")
        found.append(Turn(role, content))
    return tuple(found)


def source_of(row: Row) -> Source:
    """The prompt in a line of a file: its `messages`, else its `source`.

    Raises:
        DataError: the line has neither field, or its value cannot be used.
    """
    if "messages" not in row.fields:
        return row.text("source")
    try:
        return turns(row.fields["messages"])
    except DataError as error:
        raise row.error(str(error)) from error
