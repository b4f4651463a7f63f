"""A refusal names a parameter as the client did."""

import pytest

from server.http.names import names_as_sent

JSON_FORMAT = {"type": "json_object"}
STRICT_TOOL = {"type": "function", "function": {"name": "f", "strict": True}}


@pytest.mark.parametrize(
    ("request_", "name"),
    [
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
        ({"response_format": JSON_FORMAT}, "response_format"),
        ({"response_format": JSON_FORMAT, "tools": [STRICT_TOOL]}, "response_format"),
        ({"response_format": {"type": "text"}, "tools": [STRICT_TOOL]}, "tools"),
        ({"response_format": None, "tools": [STRICT_TOOL], "tool_choice": "auto"}, "tools"),
        ({"tools": [STRICT_TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [STRICT_TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [STRICT_TOOL], "tool_choice": {"type": "auto"}}, "tools"),
        ({"tools": [STRICT_TOOL], "tool_choice": {"type": "any"}}, "tool_choice"),
        ({"text": {"format": JSON_FORMAT}}, "text.format"),
        ({"text": {"format": {"type": "text"}}, "tools": [STRICT_TOOL]}, "tools"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format"),
        ({"text": "nonsense", "tools": 3, "tool_choice": 7}, "tool_choice"),
        ({}, "structured_outputs"),
    ],
)
def test_structured_output_has_the_name_that_was_sent(request_, name):
    assert names_as_sent(request_)["structured_outputs"] == name


@pytest.mark.parametrize(
    ("request_", "parameter", "name"),
    [
        ({"logprobs": True, "top_logprobs": -1}, "logprobs", "top_logprobs"),
        ({"logprobs": -1}, "logprobs", "logprobs"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking_token_budget", "thinking"),
        ({"messages": [{}]}, "prompt", "messages"),
        ({"input": "x"}, "prompt", "input"),
        ({"prompt": "x"}, "prompt", "prompt"),
    ],
)
def test_a_parameter_has_the_name_that_was_sent(request_, parameter, name):
    assert names_as_sent(request_).get(parameter, parameter) == name
