"""The only reader of request bodies: what it takes, vLLM and the teacher can read and write again."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from server.http.errors import BadRequest

DEEPEST = 200
"""Levels of nesting that a body may have. Python's own readers and writers of JSON end at some 1,000."""
HALF = re.compile("[\ud800-\udfff]")
# Without any of these, no number is infinite and no string has half of a surrogate pair.
SUSPECT = re.compile(r"NaN|Infinity|[eE]\+?\d{3}|\d{300}|\\u[dD][89a-fA-F]")


class _Value(NamedTuple):
    """A value somewhere in a body."""

    value: Any
    depth: int
    param: str | None = None
    """The field at the top of the body that it belongs to."""
    where: str = ""
    """The way to it, such as ``messages[0].content``."""


def read_body(body: bytes) -> Any:
    """The value of a body. As in vLLM's own reader, the last of several equal names counts.

    Raises:
        BadRequest: it is not JSON, is nested too deeply, or has a number or a string that JSON does not have.
    """
    try:
        text = body.decode(json.detect_encoding(body))
        value = json.loads(text)
    except UnicodeDecodeError as error:
        message = f"the body is not Unicode text: {error.reason} at byte {error.start}"
        raise BadRequest(None, message) from error
    except RecursionError as error:
        raise BadRequest(None, f"the body is nested more than {DEEPEST} levels deep") from error
    except json.JSONDecodeError as error:
        raise BadRequest(None, f"the body is not JSON: {error}") from error
    except ValueError as error:  # Python converts no integer of more than 4,300 digits
        raise BadRequest(None, "the body has a number of too many digits") from error
    if SUSPECT.search(text) or text.count("[") + text.count("{") > DEEPEST:
        for found in _values(value):
            _check(found)
    return value


def _check(found: _Value) -> None:
    problem = None
    if found.depth > DEEPEST:
        problem = f"nested more than {DEEPEST} levels deep"
    elif isinstance(found.value, float) and not math.isfinite(found.value):
        problem = "JSON has finite numbers only"
    elif isinstance(found.value, str) and HALF.search(found.value):
        problem = "a string with half of a surrogate pair, which is no character"
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
