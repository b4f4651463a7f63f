"""Formats pydantic's validation errors in one line."""

from pydantic import ValidationError


def problems(error: ValidationError) -> str:
    """All problems in one line, separated by semicolons, each with its place in the value."""
    found = []
    for entry in error.errors():
        place = ".".join(map(str, entry["loc"]))
        problem = entry["msg"].removeprefix("Value error, ")
        found.append(f"{place}: {problem}" if place else problem)
    return "; ".join(found)
