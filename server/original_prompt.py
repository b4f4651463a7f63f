"""The prompt before the student's chat template and tokenizer were applied.

A teacher with another template or tokenizer starts from it, and so do budgets in words.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from router.words import turn_of_words

OURS_ALONE = ("tokenize", "return_dict")
"""Template arguments that say how the student's prompt is returned, not what is in it."""


@dataclass(eq=False)
class OriginalPrompt:
    """A body for a server's ``/tokenize``, which turns it into a prompt by its own template and tokenizer."""

    body: dict[str, Any]
    obstacle: str | None = None
    """Name of a parameter that makes the student read something else, if there is one."""
    teacher_ids: dict[str, list[int]] = field(default_factory=dict)
    """The prompt's token ids at each teacher that was asked, by its name; all choices share them."""
    render: Callable[[str], Awaitable[list[int] | None]] | None = None
    """Returns the student's prompt with these words in it, as token ids; None if it has no place for them."""

    @classmethod
    def of_messages(
        cls, messages: Sequence[Any], chat: Any, tokenizing: Any, default_template: str | None
    ) -> "OriginalPrompt":
        """The original of a chat; ``chat`` and ``tokenizing``: vLLM's `ChatParams` and `TokenizeParams`."""
        arguments = dict(chat.chat_template_kwargs)
        obstacle = _truncated(tokenizing)
        if chat.chat_template != default_template or "chat_template" in arguments:
            obstacle = "chat_template"
        body: dict[str, Any] = {
            "messages": plain(messages),
            "add_generation_prompt": arguments.pop("add_generation_prompt", True),
            "continue_final_message": arguments.pop("continue_final_message", False),
            "add_special_tokens": bool(tokenizing and tokenizing.add_special_tokens),
        }
        if tools := arguments.pop("tools", None):
            body["tools"] = plain(tools)
        if kept := {name: value for name, value in arguments.items() if name not in OURS_ALONE}:
            body["chat_template_kwargs"] = plain(kept)
        return cls(body, obstacle)

    @classmethod
    def of_text(cls, text: str, tokenizing: Any) -> "OriginalPrompt":
        """The original of a text that is to be continued; ``tokenizing``: vLLM's `TokenizeParams`."""
        special = tokenizing is None or tokenizing.add_special_tokens
        return cls({"prompt": text, "add_special_tokens": special}, _truncated(tokenizing))


def _truncated(tokenizing: Any) -> str | None:
    """The parameter that cuts the student's prompt, if it does: other tokenizers cannot find the same cut."""
    if tokenizing is None or tokenizing.truncate_prompt_tokens is None:
        return None
    return "truncate_prompt_tokens"


def begun_with(messages: Sequence[Any], words: str) -> list[Any] | None:
    """A conversation with words at the start of the turn by `turn_of_words`; None without such a turn."""
    changed = list(messages)
    place = turn_of_words([_role(message) for message in changed])
    if place is None:
        return None
    message = plain(changed[place])
    message["content"] = _content(message.get("content"), words)
    changed[place] = message
    return changed


def _role(message: Any) -> str:
    role = message.get("role") if isinstance(message, Mapping) else getattr(message, "role", "")
    return str(role)


def _content(content: Any, words: str) -> Any:
    """A message's content, a text or a list of parts, with words at its beginning."""
    if not isinstance(content, list):
        return words + (content or "")
    parts = list(content)
    for place, part in enumerate(parts):
        if isinstance(part, str):
            parts[place] = words + part
            return parts
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            parts[place] = {**part, "text": words + part["text"]}
            return parts
    return [{"type": "text", "text": words}, *parts]


def plain(value: Any) -> Any:
    """A value as JSON: vLLM's own classes and iterables become objects and arrays."""
    if isinstance(value, BaseModel):
        return plain(value.model_dump(exclude_none=True))
    if isinstance(value, Mapping):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [plain(entry) for entry in value]
    return value
