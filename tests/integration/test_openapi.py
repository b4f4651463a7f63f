"""The gateway keeps its own OpenAPI document: schemathesis checks its promises and its refusals."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import positive_data_acceptance, status_code_conformance

from measuring.pair import Serving
from server.http.fields import HEADER, STREAMED
from tests.helpers.client import MODEL, PATIENCE

EXAMPLES = 5
ENDLESS = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
# vLLM's routes whose document is wrong in stock vLLM too, and the checks that are left out for them.
# For all bodies: vLLM demands more than its schemas say (a prompt, a message, an existing model).
UNDOCUMENTED = {
    ("get", "/v1/responses/{response_id}"): [status_code_conformance],  # 404
    ("post", "/v1/responses/{response_id}/cancel"): [status_code_conformance],  # 404
}
LEFT_OUT = {
    "/v1/systemone": "501: not for this model",
    "/load": "500 unless vLLM's --enable-server-load-tracking",
    "/kv_event_sources": "of an engine that publishes its cache's events",
    "/scale_elastic_ep": "would change the engine",
    "/is_scaling_elastic_ep": "of an engine that is spread over machines",
}
VALID = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 3},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 3},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
}


@pytest.fixture(scope="module")
def document(stack: Serving) -> dict[str, Any]:
    load_all_checks()
    return httpx.get(f"{stack.gateway}/openapi.json", timeout=PATIENCE).json()


def keeps_its_word(operation: Any, url: str, excluded: list[Any]) -> None:
    @ENDLESS
    @given(operation.as_strategy())
    def keeps(case: schemathesis.Case) -> None:
        case.call_and_validate(base_url=url, excluded_checks=excluded, timeout=PATIENCE)

    keeps()


def test_every_operation_agrees_with_the_document(document: dict[str, Any], stack: Serving) -> None:
    tested = set()
    for result in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = result.ok()
        if operation.path in LEFT_OUT:
            continue
        excluded = list(UNDOCUMENTED.get((operation.method, operation.path), ()))
        if operation.method == "post":
            excluded.append(positive_data_acceptance)
        keeps_its_word(operation, stack.gateway, excluded)
        tested.add(operation.path)
    assert tested >= {"/ready", "/budgets", *STREAMED}


def around_the_budget(document: dict[str, Any], path: str) -> dict[str, Any]:
    """The document of one path. Its body is valid except for `teacher_budget`, which may be anything."""
    body = {"model": MODEL} | VALID[path]
    operation = document["paths"][path]["post"]
    properties = {name: {"const": value} for name, value in body.items()}
    properties["teacher_budget"] = {"$ref": "#/components/schemas/TeacherBudget"}
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    content = {"application/json": {"schema": schema}}
    operation = operation | {"requestBody": {"required": True, "content": content}}
    del operation["parameters"]
    return document | {"paths": {path: {"post": operation}}}


def around_the_header(document: dict[str, Any], path: str) -> dict[str, Any]:
    """The document of one path. Its body is valid and has no budget."""
    around = around_the_budget(document, path)
    operation = around["paths"][path]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    del schema["properties"]["teacher_budget"]
    schema["required"].remove("teacher_budget")
    parameters = document["paths"][path]["post"]["parameters"]
    operation["parameters"] = [each for each in parameters if each["name"] == HEADER]
    return around


@pytest.mark.parametrize("path", STREAMED)
@pytest.mark.parametrize("around", [around_the_budget, around_the_header])
def test_every_budget_of_the_document_is_honoured(
    document: dict[str, Any], stack: Serving, path: str, around: Callable[..., dict[str, Any]]
) -> None:
    schema = schemathesis.openapi.from_dict(around(document, path))

    @settings(ENDLESS, max_examples=20)
    @given(schema[path]["POST"].as_strategy())
    def honoured(case: schemathesis.Case) -> None:
        response = case.call_and_validate(base_url=stack.gateway, timeout=PATIENCE)
        assert response.status_code == 200

    honoured()


@pytest.mark.parametrize("path", STREAMED)
def test_other_budgets_are_refused(document: dict[str, Any], stack: Serving, path: str) -> None:
    schema = schemathesis.openapi.from_dict(around_the_budget(document, path))
    mode = schemathesis.GenerationMode.NEGATIVE

    @settings(ENDLESS, max_examples=20)
    @given(schema[path]["POST"].as_strategy(generation_mode=mode))
    def refused(case: schemathesis.Case) -> None:
        budget = case.body.get("teacher_budget") if isinstance(case.body, dict) else None
        if budget is None or case.body != {"model": MODEL, **VALID[path], "teacher_budget": budget}:
            return  # something else is wrong with it
        response = case.call(base_url=stack.gateway, timeout=PATIENCE)
        assert response.status_code == 400
        error = response.json()["error"]
        if path == "/v1/messages":  # Anthropic's errors have no field for it
            assert error["type"] == "invalid_request_error"
            assert error["message"].startswith("teacher_budget")
        else:
            assert error["param"] == "teacher_budget"

    refused()
