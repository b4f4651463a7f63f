"""The only reader of request bodies. It accepts only what vLLM and the teacher can read too."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from router.errors import BadRequest

DEEPEST = 200
"""Most levels of nesting that a body may have. Python's own readers and writers of JSON fail near 1,000."""
HALF = re.compile("[\ud800-\udfff]")


class _NotFinite(Exception):
    """A number that JSON does not allow, such as NaN or infinity."""


class _Value(NamedTuple):
    """A value somewhere in a body."""

    value: Any
    depth: int
    param: str | None = None
    """The field at the top of the body that it belongs to."""
    where: str = ""
    """Path to the value, such as ``messages[0].content``."""


def read_body(body: bytes) -> Any:
    """The value of a body. As in vLLM's own reader, the last of several equal names counts.

    Raises:
        BadRequest: the body is not JSON, is too deep, or has a number or a string that JSON does not allow.
    """
    try:
        text = body.decode(json.detect_encoding(body))
        value = _decoded(text)
    except UnicodeDecodeError as error:
        message = f"the body is not Unicode text: {error.reason} at byte {error.start}"
        raise BadRequest(None, message) from error
    except RecursionError as error:
        raise BadRequest(None, f"the body is nested more than {DEEPEST} levels deep") from error
    except json.JSONDecodeError as error:
        raise BadRequest(None, f"the body is not JSON: {error}") from error
    except ValueError as error:  # Python converts no integer of more than 4,300 digits
        raise BadRequest(None, "the body has a number of too many digits") from error
    if _has_halves(text, value) or _is_deep(text, value):
        _name_problem(value)
    return value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _NotFinite
    return value


_DECODER = json.JSONDecoder(parse_float=_number, parse_constant=_number)


def _decoded(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except _NotFinite:
        value = json.loads(text)
        _name_problem(value)
        return value


def _has_halves(text: str, value: Any) -> bool:
    """Whether a string has half of a surrogate pair. Only an escape can bring one into valid Unicode."""
    if "\\ud" not in text and "\\uD" not in text:
        return False
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return True
    return False


def _is_deep(text: str, value: Any) -> bool:
    """Whether some container has `DEEPEST` others around it."""
    if text.count("[") + text.count("{") <= DEEPEST:
        return False
    level = [value]
    for _ in range(DEEPEST):
        level = _containers(level)
    return bool(level)


def _containers(level: list[Any]) -> list[Any]:
    """The lists and objects that are entries of these containers."""
    found: list[Any] = []
    for container in level:
        entries = container.values() if isinstance(container, dict) else container
        found += [entry for entry in entries if isinstance(entry, dict | list)]
    return found


def _name_problem(value: Any) -> None:
    """Raises BadRequest for the first value that JSON does not allow, or that is nested too deeply."""
    for found in _values(value):
        _check(found)


def _check(found: _Value) -> None:
    problem = None
    if found.depth > DEEPEST:
        problem = f"nested more than {DEEPEST} levels deep"
    elif isinstance(found.value, float) and not math.isfinite(found.value):
        problem = "JSON has finite numbers only"
    elif isinstance(found.value, str) and HALF.search(found.value):
        problem = "a string with half of a surrogate pair, which is not a character"
    if problem is not None:
        raise BadRequest(found.param, f"{found.where[:80] or 'the body'}: {problem}")


def _values(body: Any) -> Iterator[_Value]:
    """Every value of a body, and every name of a field."""
    left = [_Value(body, 0)]
    while left:
        found = left.pop()
        yield found
        value, depth, param, where = found
        if isinstance(value, list):
            for index, entry in enumerate(value):
                left.append(_Value(entry, depth + 1, param, f"{where}[{index}]"))
        elif isinstance(value, dict):
            for name, entry in value.items():
                shown = HALF.sub("?", name)
                way = f"{where}.{shown}" if where else shown
                left.append(_Value(name, depth, param or shown, way))
                left.append(_Value(entry, depth + 1, param or shown, way))
