"""Our fields in the OpenAPI document."""

from copy import deepcopy
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from router.budget import Budget
from server.exchange import Report
from server.http.fields import ALONE, PATHS, STREAMED
from server.http.openapi import document

# The OpenAPI document


@pytest.fixture
def documented() -> dict[str, Any]:
    """The document of an app that lacks one path and has no schema for another."""
    names = {path: f"Request{i}" for i, path in enumerate(PATHS) if path != ALONE[-1]}

    def operation(path: str) -> dict[str, Any]:
        responses = {"200": {"content": {"text/event-stream": {}}}, "503": {"description": "vLLM's"}}
        reference = {"$ref": f"#/components/schemas/{names[path]}"}
        body = {"requestBody": {"content": {"application/json": {"schema": reference}}}}
        return {"post": {"responses": responses} | ({} if path == "/invocations" else body)}

    class App:
        def openapi(self) -> dict[str, Any]:
            schemas = {name: {"properties": {"model": {}}} for name in names.values()}
            return {"paths": {path: operation(path) for path in names}, "components": {"schemas": schemas}}

    app = App()
    document(app)
    return app.openapi()


def test_the_budget_is_documented_where_there_is_a_body(documented):
    schemas = documented["components"]["schemas"]
    number, parts, nothing = schemas["TeacherBudget"]["anyOf"]
    assert (number["minimum"], number["maximum"]) == (0, 1)
    assert parts["properties"].keys() == {"fraction", "tokens", "calls", "cost", "teachers"}
    required = [some["required"] for some in parts["anyOf"]]
    assert required == [["fraction"], ["tokens"], ["calls"], ["cost"], ["teachers"]]
    assert schemas["Bounds"]["properties"].keys() == {"fraction", "tokens", "calls", "cost"}
    assert nothing == {"type": "null"}
    bodies = [schema for name, schema in schemas.items() if name.startswith("Request")]
    assert len(bodies) == len(PATHS) - 1
    for field in ("teacher_budget", "teacher_session"):
        assert sum(field in schema["properties"] for schema in bodies) == len(bodies) - 1


@pytest.mark.parametrize(
    "budget",
    [
        0.5,
        {"fraction": 0.5},
        {"fraction": 0.5, "teachers": ["teacher"]},
        {"fraction": 0.5, "teachers": {"teacher": None}},
        {"teachers": {"teacher": 0.5}},
        {"teachers": {"teacher": {"calls": 2}}, "tokens": None},
        {},
        {"teachers": ["teacher"]},
        {"teachers": {"teacher": None}},
        {"teachers": {}, "tokens": 1},
        {"teachers": [], "tokens": 1},
        {"teachers": ["teacher", "teacher"], "tokens": 1},
        {"teachers": {"teacher": {}}},
        {"teachers": {"teacher": 2}},
        {"teachers": {"teacher": {"teachers": ["teacher"]}}},
    ],
)
def test_the_document_allows_exactly_the_honoured_budgets(documented, budget):
    schema = {"$ref": "#/components/schemas/TeacherBudget", "components": documented["components"]}
    try:
        Budget.model_validate(budget)
        honoured = True
    except ValidationError:
        honoured = False
    assert Draft202012Validator(schema).is_valid(budget) == honoured


def test_other_names_are_not_in_the_document(documented):
    schema = {"$ref": "#/components/schemas/TeacherBudget", "components": documented["components"]}
    for teachers in (["big"], {"big": 0.1}):
        assert not Draft202012Validator(schema).is_valid({"fraction": 0.1, "teachers": teachers})


def test_a_session_is_documented(documented):
    name, parts, nothing = documented["components"]["schemas"]["TeacherSession"]["anyOf"]
    assert (name, nothing) == ({"type": "string"}, {"type": "null"})
    assert parts["properties"].keys() == {"id", "tokens", "cost"}
    assert parts["required"] == ["id"]


def test_the_headers_are_documented_once(documented):
    for operations in documented["paths"].values():
        budget, session = operations["post"]["parameters"]
        for header, name in ((budget, "X-Teacher-Budget"), (session, "X-Teacher-Session")):
            assert (header["name"], header["in"], header["required"]) == (name, "header", False)
        schema = budget["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/TeacherBudget"}


def test_a_document_that_is_asked_for_again_is_the_same():
    operation = {"parameters": [{"name": "x", "in": "query"}], "responses": {"200": {}}}
    cached = {"paths": {STREAMED[0]: {"post": operation}}, "components": {"schemas": {}}}

    class App:
        def openapi(self) -> dict[str, Any]:
            return cached

    app = App()
    document(app)
    first = deepcopy(app.openapi())
    assert app.openapi() == first
    names = [each["name"] for each in first["paths"][STREAMED[0]]["post"]["parameters"]]
    assert names == ["x", "X-Teacher-Budget", "X-Teacher-Session"]


def test_the_report_is_documented_on_every_path(documented):
    assert documented["paths"].keys() == {*PATHS} - {ALONE[-1]}
    report = documented["components"]["schemas"]["Teacher"]
    fields = {*Report(own_tokens=0).as_dict().keys(), "cost", "saved", "session", "teachers"}
    assert report["properties"].keys() == fields
    assert set(report["required"]) == Report().as_dict().keys()
    assert report["properties"]["session"]["$ref"] == "#/components/schemas/SessionFields"
    session = documented["components"]["schemas"]["SessionFields"]
    assert session["properties"].keys() == {"id", "tokens", "tokens_spent", "cost", "cost_spent"}
    for path, operations in documented["paths"].items():
        responses = operations["post"]["responses"]
        assert responses["200"]["content"]["application/json"]["schema"]["required"] == ["teacher"]
        streamed = responses["200"]["content"]["text/event-stream"].get("schema", {}).get("properties", {})
        assert streamed.keys() == ({"source", "teacher"} if path in STREAMED else set())
        assert responses["503"] == {"description": "vLLM's"}
        assert {"401", "429", "502"} < responses.keys()
