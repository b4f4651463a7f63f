"""Formats pydantic's validation errors in one line."""

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

SIMILAR = 0.75
"""Least similarity of a proposed name, of 1."""


def problems(error: ValidationError, value: Any = None, known: Collection[str] = ()) -> str:
    """All problems in one line, separated by semicolons, each with its place in the value.

    Args:
        error: the error.
        value: the value that was checked; with it, places have no kinds that a field `type` selects.
        known: names of fields, one of which may have been meant by an unknown field.
    """
    return "; ".join(problem(entry, value, known) for entry in error.errors())


def problem(entry: Mapping[str, Any], value: Any = None, known: Collection[str] = ()) -> str:
    """One problem; for the arguments see `problems`."""
    place = ".".join(place_of(entry["loc"], value))
    if entry["type"] == "extra_forbidden":
        return f"{place}: unknown field{meant(str(entry['loc'][-1]), known)}"
    text = entry["msg"].removeprefix("Value error, ")
    return f"{place}: {text}" if place else text


def place_of(loc: Sequence[int | str], value: Any = None) -> list[str]:
    """The place of a problem, without the parts that only name a kind of value.

    These are parts in parentheses, and the content of a field `type`.
    """
    parts = []
    for part in loc:
        here = value if isinstance(value, Mapping) else {}
        if str(part).startswith("(") or (part not in here and here.get("type") == part):
            continue
        parts.append(str(part))
        if isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            value = here.get(part)
    return parts


def meant(name: str, known: Collection[str]) -> str:
    """A question whether the most similar of the known names was meant; empty if none is similar."""
    similar = get_close_matches(name, known, n=1, cutoff=SIMILAR)
    return f" (did you mean {similar[0]}?)" if similar else ""


def field_names(model: type[BaseModel]) -> set[str]:
    """Names of all fields of a model, and of the models in it."""
    schema = model.model_json_schema()
    parts = [schema, *schema.get("$defs", {}).values()]
    return {name for part in parts for name in part.get("properties", {})}
