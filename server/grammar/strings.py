"""Replaces bounds of a string's length by a pattern.

In strings of bounded length, xgrammar allows raw control characters, which JSON forbids. A pattern bounds the
length without them. xgrammar reads it as the pattern of a string in JSON.
"""

from typing import Any

CHARACTER = r'[^\x00-\x1f"\\]'
"""Pattern of a character that xgrammar allows in such a string, without the control characters."""
BOUNDS = ("minLength", "maxLength")
VALUES = ("const", "enum", "default", "examples")
"""Keys whose values are no schemas."""


def without_control_characters(node: Any) -> Any:
    """A JSON schema, or a value with schemas in it, with a pattern in place of the bounds of each string."""
    if isinstance(node, list):
        return [without_control_characters(part) for part in node]
    if not isinstance(node, dict):
        return node
    if _is_bounded(node):
        low, high = node.get("minLength", 0), node.get("maxLength", "")
        rest = {key: value for key, value in node.items() if key not in BOUNDS}
        return rest | {"pattern": f"^{CHARACTER}{{{low},{high}}}$"}
    return {key: value if key in VALUES else without_control_characters(value) for key, value in node.items()}


def _is_bounded(node: dict[str, Any]) -> bool:
    """Whether this is the schema of a string with a length and nothing else to follow."""
    types = node.get("type")
    if types != "string" and not (isinstance(types, list) and "string" in types):
        return False
    lengths = [node[key] for key in BOUNDS if key in node]
    sound = all(type(length) is int and length >= 0 for length in lengths)
    return bool(lengths) and sound and lengths == sorted(lengths) and not {"pattern", "format"} & node.keys()
