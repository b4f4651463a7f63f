"""Adds the gateway's fields to the OpenAPI document of vLLM's app."""

from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter

from router.budget import PARTS, Bounds
from server.exchange import ReportFields
from server.http.errors import speaks_anthropic
from server.http.fields import FIELD, HEADER, PATHS, SESSION_FIELD, SESSION_HEADER, STREAMED
from server.sessions import SessionBudget
from server.sources import TEACHER

# Statuses that the gateway adds to vLLM's.
REFUSALS = {
    "401": "Missing or unknown API key",
    "429": "A limit of the API key is used up",
    "502": "The teacher failed, and the gateway runs with on_teacher_error: error",
    "503": "The gateway is shutting down",
}


def document(app: Any, teachers: Sequence[str] = (TEACHER,)) -> None:
    """Add to the app's OpenAPI document: `teacher_budget`, its header, `teacher` and `source`.

    ``teachers``: names of the configured teachers.
    """
    vllms = app.openapi

    def openapi() -> dict[str, Any]:
        document: dict[str, Any] = vllms()
        schemas = document["components"]["schemas"]
        schemas["Bounds"] = _bounds()
        schemas["TeacherBudget"] = {
            "title": "Teacher budget",
            "description": "Limit on teacher tokens: a fraction of the completion, or an object of limits.",
            "anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, _budget(teachers), {"type": "null"}],
        }
        schemas["TeacherSession"] = {
            "title": "Teacher session",
            "description": "A session whose requests share one budget. The first request sets it.",
            "anyOf": [{"type": "string"}, SessionBudget.model_json_schema(), {"type": "null"}],
        }
        report = TypeAdapter(ReportFields).json_schema(ref_template="#/components/schemas/{model}")
        schemas |= report.pop("$defs")
        schemas["Teacher"] = report
        for path in PATHS:
            if path not in document["paths"]:  # vLLM has it only if it is switched on
                continue
            operation = document["paths"][path]["post"]
            ours = {header["name"] for header in _HEADERS}
            others = [each for each in operation.get("parameters", ()) if each.get("name") not in ours]
            operation["parameters"] = [*others, *_HEADERS]  # vLLM returns the same document every time
            if "requestBody" in operation:
                body = operation["requestBody"]["content"]["application/json"]["schema"]
                properties = schemas[body["$ref"].rsplit("/", 1)[1]]["properties"]
                properties[FIELD] = {"$ref": "#/components/schemas/TeacherBudget"}
                properties[SESSION_FIELD] = {"$ref": "#/components/schemas/TeacherSession"}
            answer = operation["responses"]["200"]
            answer["content"] = _answer(answer.get("content", {}), streams=path in STREAMED)
            for status, when in REFUSALS.items():
                name = "AnthropicErrorResponse" if speaks_anthropic(path) else "ErrorResponse"
                schema = {"$ref": f"#/components/schemas/{name}"}
                content = {"application/json": {"schema": schema}}
                operation["responses"].setdefault(status, {"description": when, "content": content})
        return document

    app.openapi = openapi


def _bounds() -> dict[str, Any]:
    """JSON schema of `Bounds`, with the rule that at least one part is set, which its own schema lacks."""
    some = [{"required": [part], "properties": {part: {"type": "number"}}} for part in PARTS]
    return Bounds.model_json_schema() | {"anyOf": some}


def _budget(names: Sequence[str]) -> dict[str, Any]:
    """JSON schema of a budget: bounds of all teachers together, and of single ones."""
    bounds = _bounds()
    number = {"type": "number", "minimum": 0, "maximum": 1}
    own = {"anyOf": [number, {"$ref": "#/components/schemas/Bounds"}, {"type": "null"}]}
    listed = {"type": "array", "items": {"enum": list(names)}, "minItems": 1, "uniqueItems": True}
    each = {"type": "object", "properties": dict.fromkeys(names, own), "additionalProperties": False}
    teachers = {
        "description": "Those that may be asked, by name; and what each may have, if it has a budget.",
        "anyOf": [listed, {**each, "minProperties": 1}, {"type": "null"}],
    }
    all_bound = {"type": "object", "additionalProperties": {"type": ["number", "object"]}}
    return bounds | {
        "title": "Budget",
        "properties": {**bounds["properties"], "teachers": teachers},
        "anyOf": [*bounds["anyOf"], {"required": ["teachers"], "properties": {"teachers": all_bound}}],
    }


_HEADERS = [
    {
        "name": HEADER,
        "in": "header",
        "required": False,
        "description": f"The budget of a request whose body has no {FIELD}.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/TeacherBudget"}}},
    },
    {
        "name": SESSION_HEADER,
        "in": "header",
        "required": False,
        "description": f"An id, or JSON: the session of a request whose body has no {SESSION_FIELD}.",
        "schema": {"type": "string"},
    },
]


def _answer(content: dict[str, Any], *, streams: bool) -> dict[str, Any]:
    """Media types of a response, with the gateway's fields. vLLM itself does not describe the contents."""
    report = {"$ref": "#/components/schemas/Teacher"}
    body = {"type": "object", "properties": {"teacher": report}, "required": ["teacher"]}
    content = {**content, "application/json": {"schema": body}}
    if streams:
        source = {"type": "string", "description": "student, teacher, or the name of one of several teachers"}
        chunk = {"source": source, "teacher": report}
        described = "Server-sent events: JSON with who wrote what is new in it, in the last one the report."
        content["text/event-stream"] = {"schema": {"description": described, "properties": chunk}}
    return content
