"""One model, asked through the gateway and asked directly: the same requests, the same answers and refusals.

The stock server is the teacher's. At budget 1 the gateway's answer is the teacher's own; at budget 0 it is
the student's, which has the teacher's weights here (`twins`).
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from measuring.pair import Serving
from tests.helpers.client import MODEL, PATIENCE
from tests.helpers.replies import comparable

CHAT, COMPLETIONS, RESPONSES, MESSAGES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
)
SOURCE = "Thank you for your question. Karl has ten brothers and three sisters. See you soon!"
ASKED = [{"role": "user", "content": SOURCE}]
PROMPT = [5, 9, 17, 30, 41]
GOOD = [
    *(
        (CHAT, {"messages": ASKED} | parameters)
        for parameters in (
            {},
            {"max_tokens": 5},
            {"max_completion_tokens": 7},
            {"logprobs": True},
            {"logprobs": True, "top_logprobs": 0},
            {"logprobs": True, "top_logprobs": 4},
            {"logprobs": True, "top_logprobs": 2, "return_tokens_as_token_ids": True},
            {"logprobs": True, "logprob_token_ids": [80, 70, 11]},
            {"return_token_ids": True},
            {"stop": ["e"]},
            {"stop": ["er", " d"], "include_stop_str_in_output": True},
            {"stop_token_ids": [70, 75, 80, 85, 90]},
            {"min_tokens": 40, "max_tokens": 60},
            {"ignore_eos": True, "max_tokens": 50},
            {"logit_bias": {"70": 5}},
            {"allowed_token_ids": [70, 71, 72, 80, 90], "max_tokens": 20},
            {"repetition_penalty": 1.3},
            {"skip_special_tokens": False},
            {
                "messages": [*ASKED, {"role": "assistant", "content": "Das"}],
                "continue_final_message": True,
                "add_generation_prompt": False,
            },
        )
    ),
    *(
        (COMPLETIONS, {"prompt": PROMPT} | parameters)
        for parameters in (
            {},
            {"prompt": SOURCE},
            {"prompt": [SOURCE, "Karl has ten brothers."], "max_tokens": 6},
            {"prompt": [PROMPT, PROMPT[::-1]]},
            {"logprobs": 0},
            {"logprobs": 3},
            {"logprobs": 1, "logprob_token_ids": [80, 70, 11]},
            {"echo": True, "max_tokens": 3},
            {"return_token_ids": True, "truncate_prompt_tokens": 3},
        )
    ),
    (RESPONSES, {"input": SOURCE}),
    (RESPONSES, {"input": SOURCE, "max_output_tokens": 6, "instructions": "Be brief."}),
    (MESSAGES, {"messages": ASKED, "max_tokens": 60}),
    (MESSAGES, {"messages": ASKED, "max_tokens": 5}),
    (MESSAGES, {"messages": ASKED, "max_tokens": 60, "stop_sequences": ["er"]}),
]
# Parameters that two models cannot honour; at budget 0 they work. (The prompt's log-probabilities differ: the
# stock server gives the reserved rows a share.)
GOOD_ALONE = [
    (CHAT, {"messages": ASKED, "presence_penalty": 1.5}),
    (CHAT, {"messages": ASKED, "bad_words": ["e"]}),
    (CHAT, {"messages": ASKED, "response_format": {"type": "json_object"}, "max_tokens": 20}),
    (COMPLETIONS, {"prompt": PROMPT, "structured_outputs": {"choice": ["ja", "nein"]}}),
    (COMPLETIONS, {"prompt": PROMPT, "use_beam_search": True, "n": 2, "max_tokens": 5}),
]
BAD = [
    *(
        (COMPLETIONS, {"prompt": "x"} | parameters)
        for parameters in (
            {"prompt": None},
            {"prompt": []},
            {"prompt": ""},
            {"prompt": [99999]},
            {"prompt": [-1]},
            {"prompt": "x " * 2000},
            {"model": "other"},
            {"max_tokens": -1},
            {"max_tokens": 0},
            {"max_tokens": 10000},
            {"min_tokens": 9, "max_tokens": 3},
            {"temperature": -1},
            {"top_p": 0},
            {"top_p": 1.5},
            {"top_k": -2},
            {"min_p": 2},
            {"n": 0},
            {"n": "many"},
            {"seed": 2**70},
            {"stop": [""]},
            {"stop": 7},
            {"logprobs": 21},
            {"logprobs": -2},
            {"prompt_logprobs": 1, "stream": True},
            {"presence_penalty": 3},
            {"frequency_penalty": -3},
            {"repetition_penalty": 0},
            {"logit_bias": {"a": 1}},
            {"logit_bias": {"99999": 1}},
            {"allowed_token_ids": []},
            {"allowed_token_ids": [99999]},
            {"bad_words": [""]},
            {"suffix": "y"},
            {"stream_options": {"include_usage": True}},
            {"truncate_prompt_tokens": -5},
            {"response_format": {"type": "nonsense"}},
            {"structured_outputs": {"regex": "("}},
        )
    ),
    *(
        (CHAT, {"messages": ASKED} | parameters)
        for parameters in (
            {"messages": None},
            {"messages": []},
            {"messages": "x"},
            {"messages": [{"content": "x"}]},
            {"top_logprobs": 3},
            {"logprobs": True, "top_logprobs": 21},
            {"tools": [{"type": "function"}]},
            {"tools": [], "tool_choice": "required"},
            {"n": 3},
            {"chat_template": "{{ x }}"},
            {"add_generation_prompt": True, "continue_final_message": True},
        )
    ),
    (RESPONSES, {}),
    (RESPONSES, {"input": "x", "temperature": 9}),
    (RESPONSES, {"input": "x", "previous_response_id": "nobody's"}),
    (MESSAGES, {}),
    (MESSAGES, {"messages": ASKED}),
    (MESSAGES, {"messages": ASKED, "max_tokens": 0}),
    (MESSAGES, {"messages": [], "max_tokens": 4}),
]


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=PATIENCE) as client:
        yield client


def nearly(value: Any) -> Any:
    """The value with its floats rounded, to compare all but the last digits."""
    if isinstance(value, dict):
        return {name: nearly(v) for name, v in value.items()}
    if isinstance(value, list):
        return [nearly(v) for v in value]
    return pytest.approx(value, abs=1e-3) if isinstance(value, float) else value


def merged(stream: str) -> dict[Any, Any]:
    """The result of a stream, however it is cut into chunks."""
    said: dict[Any, Any] = {"types": []}
    for line in stream.splitlines():
        if not line.startswith("data: {"):
            continue
        event = json.loads(line.removeprefix("data: "))
        for choice in event.get("choices", ()):
            of = said.setdefault(choice["index"], {"text": "", "ids": [], "logprobs": []})
            delta = choice.get("delta", {})
            of["text"] += delta.get("content") or choice.get("text") or ""
            of["ids"] += choice.get("token_ids") or []
            logprobs = choice.get("logprobs") or {}
            of["logprobs"] += logprobs.get("content") or logprobs.get("token_logprobs") or []
            of |= {name: choice[name] for name in ("finish_reason", "stop_reason") if choice.get(name)}
        if event.get("usage"):
            said["usage"] = event["usage"]
        if "type" in event:
            if event["type"] not in said["types"][-1:]:
                said["types"].append(event["type"])
            delta = event.get("delta", "")
            said["text"] = said.get("text", "") + (delta if isinstance(delta, str) else delta.get("text", ""))
    return said


def ask(http: httpx.Client, url: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    reply = http.post(url + path, json=body)
    if body.get("stream") and reply.status_code == 200:
        return 200, comparable(merged(reply.text))
    return reply.status_code, comparable(reply.json())


def same_answers(
    http: httpx.Client, stack: Serving, budget: float, path: str, body: dict[str, Any], stream: bool
) -> None:
    body = {"temperature": 0} | body
    if path in (CHAT, COMPLETIONS) and "max_completion_tokens" not in body:
        body = {"max_tokens": 96} | body
    if stream:
        options = {"stream_options": {"include_usage": True}} if path in (CHAT, COMPLETIONS) else {}
        body |= {"stream": True} | options
    theirs = ask(http, stack.teacher, path, body | {"model": "teacher"})
    ours = ask(http, stack.gateway, path, body | {"model": MODEL, "teacher_budget": budget})
    assert (ours[0], theirs[0]) == (200, 200)
    assert ours[1] == nearly(theirs[1])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), GOOD)
def test_at_budget_one_the_answer_is_that_of_the_teacher(
    http: httpx.Client, stack: Serving, path: str, body: dict[str, Any], stream: bool
) -> None:
    same_answers(http, stack, 1, path, body, stream)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), GOOD + GOOD_ALONE)
def test_at_budget_zero_the_answer_is_that_of_the_student(
    http: httpx.Client, twins: Serving, path: str, body: dict[str, Any], stream: bool
) -> None:
    if stream and body.get("use_beam_search"):
        pytest.skip("vLLM itself does not stream it")
    same_answers(http, twins, 0, path, body, stream)


@pytest.mark.parametrize("budget", [0, 0.5, 1])
@pytest.mark.parametrize(("path", "body"), BAD)
def test_requests_that_vllm_refuses_are_refused_in_the_same_words(
    http: httpx.Client, stack: Serving, path: str, body: dict[str, Any], budget: float
) -> None:
    answers = []
    for url, more in ((stack.teacher, {"model": "teacher"}), (stack.gateway, {"model": MODEL})):
        more = more | ({"teacher_budget": budget} if url == stack.gateway else {})
        reply = http.post(url + path, json=more | {"temperature": 0} | body)
        answers.append((reply.status_code, reply.text.replace(f"aliases: {more['model']}", "aliases: it")))
    (status, theirs), ours = answers
    assert 400 <= status < 500
    if "cannot be used with a teacher_budget" in ours[1]:  # refused for two models, whatever its value
        assert (budget > 0, ours[0]) == (True, 400)
    else:
        assert ours == (status, theirs)
