"""The names that clients use for parameters that have other names in vLLM."""

from collections.abc import Mapping
from typing import Any


def names_as_sent(request: Mapping[str, Any]) -> dict[str, str]:
    """The client's names of parameters that vLLM turns into sampling parameters, by vLLM's names."""
    names = {}
    if _given(request, "top_logprobs"):
        names["logprobs"] = "top_logprobs"
    if _given(request, "thinking"):
        names["thinking_token_budget"] = "thinking"
    if _given(request, "stop_sequences"):
        names["stop"] = "stop_sequences"
    for prompt in ("messages", "input", "prompt_embeds"):
        if _given(request, prompt):
            names["prompt"] = prompt
    names["structured_outputs"] = _structure(request)
    return names


def _given(request: Mapping[str, Any], name: str) -> bool:
    return request.get(name) not in (None, False, [], {})


def _structure(request: Mapping[str, Any]) -> str:
    """The parameter that asks for structured output: itself, a format, or tools that have one."""
    if _given(request, "structured_outputs"):
        return "structured_outputs"
    for outer, inner in (("response_format", None), ("text", "format"), ("output_config", "format")):
        value = request.get(outer)
        if inner is not None:
            value = value.get(inner) if isinstance(value, dict) else None
        if isinstance(value, dict) and value.get("type") != "text":
            return outer if inner is None else f"{outer}.{inner}"
    choice = request.get("tool_choice")
    choice = choice.get("type") if isinstance(choice, dict) else choice
    if choice not in (None, "auto", "none"):
        return "tool_choice"
    return "tools" if _given(request, "tools") else "structured_outputs"
