"""Turns the replies of two servers into a form in which they can be compared."""

from typing import Any

# Fields that differ with each answer, or that only we have.
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
    """A reply without the fields that differ between two servers, and without the counts of cached input."""
    if isinstance(value, dict):
        kept = {name: comparable(v) for name, v in value.items() if name not in NOT_COMPARED}
        for name in CACHED:  # Anthropic's input tokens do not include cached ones
            if name in kept:
                kept["input_tokens"] += kept.pop(name) or 0
        return kept
    return [comparable(v) for v in value] if isinstance(value, list) else value
