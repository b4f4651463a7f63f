"""Replies of two servers, in a form in which they can be compared."""

from typing import Any

# Of each answer alone, or ours.
NOT_COMPARED = {
    *(
        "id",
        "call_id",
        "item_id",
        "request_id",
        "response_id",
        "created",
        "created_at",
        "completed_at",
        "metrics",
    ),
    *("model", "system_fingerprint", "teacher", "source", "prompt_tokens_details", "input_tokens_details"),
}
CACHED = ("cache_creation_input_tokens", "cache_read_input_tokens")


def comparable(value: Any) -> Any:
    """Without what differs between two servers, and what their caches had of the input."""
    if isinstance(value, dict):
        kept = {name: comparable(v) for name, v in value.items() if name not in NOT_COMPARED}
        for name in CACHED:  # Anthropic's input tokens are those that no cache had
            if name in kept:
                kept["input_tokens"] += kept.pop(name) or 0
        return kept
    return [comparable(v) for v in value] if isinstance(value, list) else value
