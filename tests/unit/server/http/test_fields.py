"""Our fields in requests: they are taken out of the body, and wrong ones are refused."""

import json

import pytest

from router.budget import Budget
from server.http.asgi import REQUEST_ID
from server.http.fields import ALONE, HEADER, PATHS, TeacherFields
from tests.helpers.upstream import COMPLETIONS, DISCONNECT, Receive, Send, Upstream, post, request

# Requests


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("value", "budget"),
    [
        (0, Budget(fraction=0)),
        (0.25, Budget(fraction=0.25)),
        ({"tokens": 3, "calls": 1}, Budget(tokens=3, calls=1)),
    ],
)
async def test_the_budget_is_taken_out_of_the_body(path, value, budget):
    upstream = Upstream()
    await post(upstream, request(teacher_budget=value, seed=2**70), path=path)
    assert upstream.exchange.budget == budget
    assert json.loads(upstream.body) == {"model": "wheels", "prompt": "Hi", "seed": 2**70}


@pytest.mark.parametrize("path", PATHS)
async def test_a_proxy_may_send_the_root_path_or_leave_it_out(path):
    for sent in (path, f"/api{path}"):
        upstream = Upstream()
        await post(upstream, request(teacher_budget=0.25), path=sent, root_path="/api")
        assert upstream.exchange.budget == Budget(fraction=0.25)
    upstream, body = Upstream(), request(teacher_budget=2)
    await post(upstream, body, path="/apix/v1/completions", root_path="/api")
    assert upstream.body == body  # a path that has no route of ours


def test_every_surface_has_the_field():
    assert set(PATHS) == {
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/invocations",
        *ALONE,
    }


@pytest.mark.parametrize("path", PATHS)
async def test_paths_without_a_teacher_use_the_student_alone(path):
    upstream = Upstream()
    await post(upstream, request(teacher_budget=0.5), path=path)
    assert upstream.exchange.unsupported == (path if path in ALONE else None)


async def test_a_response_in_the_background_is_refused():
    upstream = Upstream()
    answer = await post(upstream, request(background=True), path="/v1/responses")
    assert (answer.status, answer.json["error"]["param"], upstream.calls) == (400, "background", 0)
    assert (await post(upstream, request(background=False), path="/v1/responses")).status == 200


@pytest.mark.parametrize("fields", [{}, {"teacher_budget": None}])
async def test_without_a_budget_the_servers_default_is_used(fields):
    upstream = Upstream()
    await post(upstream, request(**fields))
    assert upstream.exchange.budget is None
    assert json.loads(upstream.body) == json.loads(request())


async def test_a_body_without_a_budget_is_not_touched():
    upstream, body = Upstream(), b' {"model" : "wheels",\n"temperature": 0.10} '
    await post(upstream, body)
    assert upstream.body == body


async def test_a_body_may_come_in_pieces():
    upstream, body = Upstream(), request(teacher_budget=0.5, prompt="für 5 €")
    await post(upstream, *[body[i : i + 1] for i in range(len(body))])
    assert upstream.exchange.budget == Budget(fraction=0.5)
    assert json.loads(upstream.body)["prompt"] == "für 5 €"


@pytest.mark.parametrize("body", [b'"text"', b"[1]", b"17", b"null"])
async def test_a_body_that_is_not_an_object_is_left_to_vllm(body):
    upstream = Upstream()
    await post(upstream, body)
    assert upstream.body == body
    assert upstream.exchange.budget is None


@pytest.mark.parametrize(
    "body",
    [
        '{"teacher_budget": 0, "prompt": "Hi"}'.encode("utf-16"),
        '{"teacher_budget": 0, "prompt": "Hi"}'.encode("utf-8-sig"),
        b'{"teacher_budget": 1, "teacher_budget": 0}',
    ],
    ids=["UTF-16", "byte order mark", "twice"],
)
async def test_every_body_that_vllm_can_read_has_its_budget_read(body):
    """vLLM reads bodies with `json.loads`; another reader would miss a budget of 0."""
    upstream = Upstream()
    await post(upstream, body)
    assert upstream.exchange.budget == Budget(fraction=0)
    assert "teacher_budget" not in json.loads(upstream.body)


async def test_a_parameter_that_the_engine_never_sees_is_noted():
    upstream = Upstream()
    await post(upstream, request(use_beam_search=True))
    assert upstream.exchange.unsupported == "use_beam_search"
    for off in (False, None, "false", 0):
        await post(upstream, request(use_beam_search=off, teacher_budget=0.1))
        assert (upstream.exchange.unsupported, upstream.exchange.searches) == (None, False)
    await post(upstream, request(use_beam_search=True, teacher_budget=0.1))
    assert upstream.exchange.unsupported == "use_beam_search"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1.5, "teacher_budget.fraction: Input should be less than or equal to 1"),
        (-1, "teacher_budget.fraction: Input should be greater than or equal to 0"),
        (10**400, "teacher_budget.fraction: "),
        (True, "teacher_budget: not true"),
        ("0.1", 'teacher_budget: not "0.1"'),
        ([0.1], "teacher_budget: not [0.1]"),
        ({}, "teacher_budget: set at least one of fraction, tokens, calls"),
        ({"tokens": -1}, "teacher_budget.tokens: Input should be greater than or equal to 0"),
        ({"tokens": 1.5}, "teacher_budget.tokens: Input should be a valid integer"),
        ({"calls": 2**63}, "teacher_budget.calls: "),
        ({"dollars": 3}, "teacher_budget.dollars: unknown field"),
        ({"fraction": "x", "calls": "y"}, "teacher_budget.calls: "),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "replace").decode(),
)
async def test_a_bad_budget_is_refused_in_openais_shape(value, said):
    upstream = Upstream()
    answer = await post(upstream, request(teacher_budget=value))
    assert answer.status == 400
    assert answer.headers[b"content-type"] == b"application/json"
    assert answer.headers[b"content-length"] == str(len(answer.body)).encode()
    error = answer.json["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", "teacher_budget", 400)
    assert said in error["message"]
    assert (
        'expected a fraction in [0, 1], or an object with "fraction", "tokens", "calls"' in error["message"]
    )
    assert upstream.calls == 0


async def test_a_long_wrong_budget_is_not_repeated_in_full():
    answer = await post(Upstream(), request(teacher_budget="x" * 10_000))
    assert len(answer.json["error"]["message"]) < 300


@pytest.mark.parametrize("path", ["/v1/messages"])
async def test_a_bad_budget_is_refused_in_anthropics_shape(path):
    REQUEST_ID.set("order-7")
    answer = await post(Upstream(), request(teacher_budget=2), path=path)
    assert answer.status == 400
    error = answer.json.pop("error")
    assert answer.json == {"type": "error", "error": error, "request_id": "order-7"}
    assert error.keys() == {"type", "message"}
    assert error["type"] == "invalid_request_error"
    assert "teacher_budget.fraction" in error["message"]


# A budget without a field


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0", Budget(fraction=0)),
        (" 0.25 ", Budget(fraction=0.25)),
        ('{"tokens": 3, "calls": 1}', Budget(tokens=3, calls=1)),
    ],
)
async def test_a_budget_may_come_in_a_header(path, text, budget):
    upstream, body = Upstream(), request(seed=2**70)
    await post(upstream, body, path=path, headers=[("x-teacher-BUDGET", text)])
    assert (upstream.exchange.budget, upstream.exchange.budget_name) == (budget, HEADER)
    assert upstream.body == body


@pytest.mark.parametrize(
    ("fields", "header", "budget", "name"),
    [
        ({"teacher_budget": 0}, "0.5", Budget(fraction=0), "teacher_budget"),
        ({"teacher_budget": None}, "0.5", Budget(fraction=0.5), HEADER),
        ({"teacher_budget": 0.1}, "null", Budget(fraction=0.1), "teacher_budget"),
        ({}, "null", None, "teacher_budget"),
    ],
)
async def test_the_field_wins_over_the_header(fields, header, budget, name):
    upstream = Upstream()
    await post(upstream, request(**fields), headers=[(HEADER, header)])
    assert (upstream.exchange.budget, upstream.exchange.budget_name) == (budget, name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1.5", "X-Teacher-Budget.fraction: Input should be less than or equal to 1"),
        ("NaN", "neither a number nor JSON"),
        ("1e999", "neither a number nor JSON"),
        ("", 'X-Teacher-Budget: neither a number nor JSON: ""'),
        ("a lot", 'X-Teacher-Budget: neither a number nor JSON: "a lot"'),
        ("für", "X-Teacher-Budget: neither a number nor JSON"),
        ("[" * 50_000, "X-Teacher-Budget: neither a number nor JSON"),
        ("9" * 5_000, "X-Teacher-Budget: neither a number nor JSON"),
        ('"0.1"', 'X-Teacher-Budget: not "0.1"'),
        ("true", "X-Teacher-Budget: not true"),
        ("{}", "X-Teacher-Budget: set at least one of fraction, tokens, calls"),
        ('{"tokens": -1}', "X-Teacher-Budget.tokens: Input should be greater than or equal to 0"),
        ('{"dollars": 3}', "X-Teacher-Budget.dollars: unknown field"),
    ],
    ids=lambda value: value[:40],
)
@pytest.mark.parametrize("fields", [{}, {"teacher_budget": 0.5}])
async def test_a_bad_header_is_refused_whatever_the_body_has(fields, text, said):
    upstream = Upstream()
    answer = await post(upstream, request(**fields), headers=[(HEADER, text)])
    error = answer.json["error"]
    assert (answer.status, error["type"], error["param"]) == (400, "BadRequestError", HEADER)
    assert said in error["message"]
    assert (
        'expected a fraction in [0, 1], or an object with "fraction", "tokens", "calls"' in error["message"]
    )
    assert len(error["message"]) < 300
    assert upstream.calls == 0


async def test_two_headers_are_no_budget():
    answer = await post(Upstream(), request(), headers=[(HEADER, "0.1"), (HEADER, "0.2")])
    assert (answer.status, answer.json["error"]["param"]) == (400, HEADER)
    assert '"0.1, 0.2"' in answer.json["error"]["message"]


async def test_a_bad_header_is_refused_in_anthropics_shape():
    answer = await post(Upstream(), request(), path="/v1/messages", headers=[(HEADER, "2")])
    assert (answer.status, answer.json["type"]) == (400, "error")
    assert answer.json["error"]["type"] == "invalid_request_error"
    assert "X-Teacher-Budget.fraction" in answer.json["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("name", "model"), [("wheels-best", "wheels-best"), ("", ""), (None, ""), (7, ""), ([], "")]
)
async def test_the_name_of_the_model_is_noted(path, name, model):
    upstream, body = Upstream(), request(model=name)
    await post(upstream, body, path=path)
    assert (upstream.exchange.model, upstream.exchange.budget) == (model, None)
    assert upstream.body == body


@pytest.mark.parametrize(
    ("fields", "nothing"),
    [
        ({"echo": True, "logprobs": 1, "max_tokens": 0}, True),
        ({"echo": True, "logprobs": 1, "max_tokens": 1}, False),
        ({"echo": False, "max_tokens": 0}, False),
        ({"max_tokens": 0}, False),
    ],
)
async def test_a_request_for_the_prompt_alone_is_noted(fields, nothing):
    upstream = Upstream()
    await post(upstream, request(**fields))
    assert upstream.exchange.writes_nothing is nothing


# Clients that leave


async def test_the_app_sees_that_a_client_leaves():
    seen = []

    async def app(scope: dict, receive: Receive, send: Send) -> None:
        seen.extend([await receive(), await receive()])

    assert await post(app, request(teacher_budget=0.1)) is None
    assert [message["type"] for message in seen] == ["http.request", "http.disconnect"]


async def test_a_client_that_leaves_within_its_body_ends_the_request():
    upstream = Upstream()
    incoming = [{"type": "http.request", "body": b'{"model', "more_body": True}, DISCONNECT]

    async def receive() -> dict:
        return incoming.pop(0)

    async def send(message: dict) -> None:
        pytest.fail("nobody is there")

    scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": []}
    await TeacherFields(upstream)(scope, receive, send)
    assert upstream.calls == 0


async def test_the_null_answer_for_a_client_that_left_is_passed_on():
    """vLLM answers `null` when a client has left before its completion was written."""
    answer = await post(Upstream(chunks=(b"null",)), request())
    assert (answer.status, answer.body) == (200, b"null")


# Everything else passes


@pytest.mark.parametrize(
    "other",
    [{"path": "/v1/embeddings"}, {"path": "/tokenize"}, {"method": "GET"}, {"path": "/v1/completions/x"}],
)
async def test_other_requests_are_not_touched(other):
    upstream, body = Upstream(chunks=(b'{"choices": []}',)), request(teacher_budget="anything")
    answer = await post(upstream, body, **other)
    assert upstream.body == body
    assert upstream.exchange is None
    assert answer.body == b'{"choices": []}'


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
async def test_other_protocols_are_not_touched(kind):
    upstream = Upstream()
    await post(upstream, b"", kind=kind)
    assert (upstream.calls, upstream.body) == (1, None)
