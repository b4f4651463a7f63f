"""Limits white space in the JSON of tool calls, which some models would write without end."""

import json
from typing import Any

MOST = 1
"""Most white-space characters in a row. xgrammar takes no 0."""


def with_little_white_space(structural_tag: str) -> str:
    """The structural tag, with a bound on the white space of every JSON schema in it.

    vLLM's setting `disable_any_whitespace` is for grammars of plain JSON alone.
    """
    tag = json.loads(structural_tag)
    _bound(tag.get("format"))
    return json.dumps(tag)


def _bound(node: Any) -> None:
    if isinstance(node, list):
        for part in node:
            _bound(part)
    elif isinstance(node, dict) and node.get("type") == "json_schema":  # what is in a schema is the caller's
        if node.get("max_whitespace_cnt") is None:
            node["max_whitespace_cnt"] = MOST
    elif isinstance(node, dict):
        for part in node.values():
            _bound(part)
