"""Converts flags of vLLM's own server to settings by name, and back, without loss.

A setting is `True` (the flag alone), `False` (its `--no-` form), a value, a list (several words), a mapping
(JSON), `None` (vLLM's default), or `Repeated`. This module knows vLLM's parser only as an argument: the
configuration is checked before vLLM is imported.
"""

import json
import re
from argparse import Action
from collections.abc import Mapping, Sequence
from typing import Any

SHORT_FLAG = re.compile(r"-[A-Za-z]")
PLAIN_KEY = re.compile(r"\w[\w-]*")


class Repeated(tuple[Any, ...]):
    """The values of a flag that was given several times, in order."""

    __slots__ = ()


def read_flags(words: Sequence[str]) -> dict[str, Any]:
    """Command line words as settings: ``--max-model-len 256 --enforce-eager``.

    Raises:
        ValueError: the first word is no flag.
    """
    settings: dict[str, Any] = {}
    name = ""
    values: list[str] = []
    for word in words:
        if not (word.startswith("--") and len(word) > 2) and not SHORT_FLAG.match(word):
            if not name:
                raise ValueError(f"expected a flag of vLLM after --, got {word!r}")
            values.append(word)
            continue
        if name:
            _add(settings, name, values)
        flag, equals, value = word.partition("=")
        name = setting_name(flag)
        values = [value] if equals else []
    if name:
        _add(settings, name, values)
    return settings


def setting_name(flag: str) -> str:
    """A flag without its two dashes, as vLLM spells it; a part after a dot is a key of its value."""
    name, dot, path = flag.removeprefix("--").partition(".")
    return name.replace("_", "-") + dot + path


def _add(settings: dict[str, Any], name: str, values: list[str]) -> None:
    value: Any = values
    if len(values) < 2:
        value = values[0] if values else True
    if name in settings:
        earlier = settings.pop(name)  # it moves to the end: of --x and --no-x, the last one counts
        if not isinstance(earlier, Repeated):
            earlier = Repeated([earlier])
        value = Repeated([*earlier, value])
    settings[name] = value


def write_flags(settings: Mapping[str, Any], actions: Mapping[str, Action]) -> list[str]:
    """Settings as words for vLLM's parser, which has these ``actions`` by flag.

    Raises:
        ValueError: a flag that takes one value has several.
    """
    words: list[str] = []
    for name, value in settings.items():
        flag = setting_name(name)
        if not flag.startswith("-"):
            flag = f"--{flag}"
        for each in value if isinstance(value, Repeated) else (value,):
            words += _words(flag, each, actions)
    return words


def _words(flag: str, value: Any, actions: Mapping[str, Action]) -> list[str]:
    head, dot, path = flag.partition(".")
    action = actions.get(head)
    if value is None:
        return []
    if dot:
        return [f"{_long(head, action)}.{path}={_text(value)}"]
    if isinstance(value, Mapping):
        return _mapping(_long(head, action), value)
    if isinstance(value, list | tuple) and action is not None:
        return _list(flag, value, action)
    if value is False and action is not None and action.nargs == 0:
        opposite = _opposite(flag, action)
        return [] if opposite is None else [opposite]
    if value is True:
        return [flag]
    return [f"{flag}={_text(value)}"]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _long(flag: str, action: Action | None) -> str:
    """The flag's long form: vLLM joins keys only if all of them use the same spelling."""
    if action is None:
        return flag
    return next((other for other in action.option_strings if other.startswith("--")), flag)


def _mapping(flag: str, value: Mapping[str, Any]) -> list[str]:
    """A mapping's words, key by key, so that ``--flag.key`` on the command line replaces only that key."""
    if value and all(isinstance(key, str) and PLAIN_KEY.fullmatch(key) for key in value):
        return [f"{flag}.{key}={json.dumps(each, default=str)}" for key, each in value.items()]
    return [f"{flag}={_text(value)}"]


def _list(flag: str, values: Sequence[Any], action: Action) -> list[str]:
    if action.type is json.loads:
        return [f"{flag}={json.dumps(values)}"]
    words = [_text(value) for value in values]
    if isinstance(action.default, list) and action.nargs is None:  # such flags add to a list
        return [f"{flag}={word}" for word in words]
    if action.nargs not in ("+", "*"):
        raise ValueError(f"{flag} takes one value, got {' '.join(words)}")
    if len(words) == 1:
        return [f"{flag}={words[0]}"]  # also if it begins with a dash
    return [flag, *words] if words else []


def _opposite(flag: str, action: Action) -> str | None:
    """The flag that switches off what this one switches on, or the other way round."""
    negative = flag.startswith("--no-")
    for other in action.option_strings:
        if other.startswith("--") and other.startswith("--no-") != negative:
            return other
    return None
