"""Requests for structured answers, and checks of the answers against their schemas."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jsonschema
from openai import AsyncOpenAI

from tests.helpers.client import MODEL


@dataclass
class Answer:
    """An answer that a client got, and the schema that it has to fit."""

    text: str
    schema: dict[str, Any]
    finish_reason: str
    tokens: int
    teacher: dict[str, Any]

    @property
    def cut(self) -> bool:
        """Whether `max_tokens` ended the answer."""
        return self.finish_reason == "length"

    def fault(self) -> str | None:
        """The reason why the answer does not fit its schema; None if it fits."""
        try:
            jsonschema.validate(json.loads(self.text), self.schema)
        except (ValueError, jsonschema.ValidationError) as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return None


def check_all(answers: Sequence[Answer], budget: float) -> None:
    """Check that each answer fits or is cut, at most half are cut, and the teacher wrote its part."""
    faults = [(answer.text, answer.fault()) for answer in answers if not answer.cut and answer.fault()]
    assert faults == []
    assert sum(answer.cut for answer in answers) <= len(answers) // 2
    written = sum(answer.tokens for answer in answers)
    assert sum(answer.teacher["tokens"] for answer in answers) >= 0.5 * budget * written


async def ask_for_schema(
    client: AsyncOpenAI, schema: dict[str, Any], budget: Any, seed: int, max_tokens: int = 200
) -> Answer:
    reply = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Give an example."}],
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        max_tokens=max_tokens,
        seed=seed,
        extra_body={"teacher_budget": budget},
    )
    return _answer(reply, reply.choices[0].message.content or "", schema)


async def ask_for_tool(
    client: AsyncOpenAI, tool: dict[str, Any], budget: Any, seed: int, max_tokens: int = 200
) -> Answer:
    """Ask for the call of a tool: by its name, or with an odd seed as any one of the tools."""
    function = tool["function"]
    named = {"type": "function", "function": {"name": function["name"]}}
    reply = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Call the tool."}],
        tools=[tool],
        tool_choice="required" if seed % 2 else named,
        parallel_tool_calls=False,
        max_tokens=max_tokens,
        seed=seed,
        extra_body={"teacher_budget": budget},
    )
    calls = reply.choices[0].message.tool_calls or ()
    text = "".join(call.function.arguments for call in calls)
    return _answer(reply, text, function["parameters"])


def _answer(reply: Any, text: str, schema: dict[str, Any]) -> Answer:
    choice = reply.choices[0]
    return Answer(text, schema, choice.finish_reason, reply.usage.completion_tokens, reply.teacher)
