import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import pytest

from router.budget import Budget
from server.exchange import EXCHANGE, Exchange, Report
from server.http.asgi import REQUEST_ID
from server.http.fields import ALONE, PATHS, STREAMED, TeacherFields
from server.http.openapi import document
from server.vllm_api import GracefulHTTPError, VLLMValidationError

Receive = Callable[[], Awaitable[dict]]
Send = Callable[[dict], Awaitable[None]]

DISCONNECT = {"type": "http.disconnect"}
COMPLETIONS = "/v1/completions"


@dataclass
class Upstream:
    """Stands in for vLLM's app: notes what reaches it, and sends what it was told to."""

    status: int = 200
    content_type: str = "application/json"
    chunks: tuple[bytes, ...] = (b"{}",)
    reports: tuple[Report, ...] = (Report(),)
    before_start: Callable[[Exchange], None] = lambda exchange: None
    before_chunk: Callable[[int, Exchange], None] = lambda index, exchange: None
    body: bytes | None = None
    exchange: Exchange | None = None
    calls: int = 0

    async def __call__(self, scope: dict, receive: Receive, send: Send) -> None:
        self.calls += 1
        self.exchange = EXCHANGE.get(None)
        if scope["type"] != "http":
            return
        self.body = b""
        more = True
        while more:
            message = await receive()
            self.body += message.get("body", b"")
            more = message.get("more_body", False)
        if self.exchange is not None:
            self.exchange.reports = list(self.reports)
            self.before_start(self.exchange)
        # ASGI's messages may leave out what has its default: an empty body, and no more of it.
        headers = [
            (b"content-type", self.content_type.encode()),
            (b"content-length", str(sum(map(len, self.chunks))).encode()),
            (b"x-request-id", b"17"),
        ]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for index, chunk in enumerate(self.chunks):
            if self.exchange is not None:
                self.before_chunk(index, self.exchange)
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body"})


@dataclass
class Answer:
    status: int
    headers: dict[bytes, bytes]
    chunks: list[bytes]

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        lines = [line for line in self.body.split(b"\n") if line.startswith(b"data: {")]
        return [json.loads(line.removeprefix(b"data: ")) for line in lines]


async def post(
    app: Any,
    *chunks: bytes,
    path: str = COMPLETIONS,
    method: str = "POST",
    kind: str = "http",
    root_path: str = "",
) -> Answer | None:
    """Sends a request through the middleware; the client leaves behind its body. None: no answer."""
    last = len(chunks) - 1
    incoming = [
        {"type": "http.request", "body": chunk} | ({"more_body": True} if index < last else {})
        for index, chunk in enumerate(chunks)
    ]
    sent: list[dict] = []

    async def receive() -> dict:
        return incoming.pop(0) if incoming else DISCONNECT

    async def send(message: dict) -> None:
        sent.append(dict(message))

    scope = {"type": kind, "method": method, "path": path, "root_path": root_path, "headers": []}
    await TeacherFields(app)(scope, receive, send)
    if not sent:
        return None
    start, *bodies = sent
    assert start["type"] == "http.response.start"
    assert {message["type"] for message in bodies} == {"http.response.body"}
    assert [message.get("more_body", False) for message in bodies] == [True] * (len(bodies) - 1) + [False]
    return Answer(start["status"], dict(start["headers"]), [message.get("body", b"") for message in bodies])


def request(**fields: Any) -> bytes:
    return json.dumps({"model": "wheels", "prompt": "Hi"} | fields).encode()


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
    assert upstream.body == body  # another path, which is nobody's


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
async def test_where_no_completion_is_written_the_student_is_alone(path):
    upstream = Upstream()
    await post(upstream, request(teacher_budget=0.5), path=path)
    assert upstream.exchange.unsupported == (path if path in ALONE else None)


async def test_a_response_in_the_background_is_refused():
    upstream = Upstream()
    answer = await post(upstream, request(background=True), path="/v1/responses")
    assert (answer.status, answer.json["error"]["param"], upstream.calls) == (400, "background", 0)
    assert (await post(upstream, request(background=False), path="/v1/responses")).status == 200


@pytest.mark.parametrize("fields", [{}, {"teacher_budget": None}])
async def test_no_budget_is_the_servers_default(fields):
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
async def test_what_is_no_object_is_left_to_vllm(body):
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


HALF = b"a string with half of a surrogate pair"
NO_JSON = [
    (b"", None, b"the body is not JSON"),
    (b"{", None, b"the body is not JSON"),
    (b"model=wheels", None, b"the body is not JSON"),
    (b"\xff\xfe\x00", None, b"the body is not Unicode text"),
    (b"\x1f\x8b\x08\x00\x00\x00\x00\x00", None, b"the body is not"),  # gzip
    (b'{"prompt": "\xff"%s}', None, b"the body is not Unicode text"),
    (b'{"prompt": "\xed\xa0\x80"%s}', None, b"the body is not Unicode text"),
    (b'{"seed": ' + b"1" * 5000 + b"%s}", None, b"the body has a number of too many digits"),
    (b"[" * 100_000, None, b"the body is nested more than 200 levels deep"),
    (b'{"x": ' + b"[" * 300 + b"]" * 300 + b"%s}", "x", b"nested more than 200 levels deep"),
    (b'{"x": ' + b'{"y": ' * 300 + b"1" + b"}" * 300 + b"%s}", "x", b"nested more than 200 levels deep"),
    (b'{"top_p": NaN%s}', "top_p", b"top_p: JSON has finite numbers only"),
    (b'{"logit_bias": {"3": -Infinity}%s}', "logit_bias", b"logit_bias.3: JSON has finite numbers only"),
    (b'{"temperature": 1e999%s}', "temperature", b"finite numbers only"),
    (b'{"temperature": 1' + b"0" * 400 + b".0%s}", "temperature", b"finite numbers only"),
    (b'{"teacher_budget": NaN}', "teacher_budget", b"teacher_budget: JSON has finite numbers only"),
    (b'{"teacher_budget": {"\\ud800": 3}}', "teacher_budget", HALF),
    (b'{"stop": ["a", "\\ud800"]%s}', "stop", b"stop[1]: " + HALF),
    (b'{"messages": [{"content": "\\uDFFF!"}]%s}', "messages", b"messages[0].content: " + HALF),
    (b'{"model": "\\ud83d"%s}', "model", HALF),
    (b'{"user": "\\udE00\\ud83d"%s}', "user", HALF),
    (b'{"metadata": {"\\ud800": "x"}%s}', "metadata", HALF),
    (b'{"\\ud800": "x"%s}', "?", HALF),
]


@pytest.mark.parametrize("budget", [b"", b', "teacher_budget": 0', b', "teacher_budget": 0.5'])
@pytest.mark.parametrize(("body", "param", "said"), NO_JSON, ids=range(len(NO_JSON)))
async def test_what_is_no_json_is_refused_with_a_budget_and_without(body, param, said, budget):
    upstream = Upstream()
    answer = await post(upstream, body.replace(b"%s", budget))
    assert (answer.status, upstream.calls) == (400, 0)
    assert answer.json["error"]["param"] == param
    assert said in answer.body
    assert len(answer.body) < 400


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "\\ud83d\\ude00 NaN Infinity \\\\ud800", "seed": 1e300}',
        b'{"logit_bias": {"3": -1e-999}, "prompt": ' + b"[" * 150 + b"]" * 150 + b"}",
        b'{"messages": [' + b'{"content": []},' * 300 + b"{}]}",
        b'{"seed": ' + b"1" * 4000 + b"}",
    ],
    ids=["whole characters", "deep enough", "wide", "long"],
)
async def test_what_is_json_passes_with_a_budget_and_without(body):
    for field in (b"", b'"teacher_budget": 0, '):
        upstream = Upstream()
        assert (await post(upstream, b"{" + field + body[1:])).status == 200
        assert json.loads(upstream.body) == json.loads(body)


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
        ({"dollars": 3}, "teacher_budget.dollars: Extra inputs are not permitted"),
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
    assert 'expected a fraction in [0, 1], or an object of "fraction", "tokens", "calls"' in error["message"]
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


async def test_leaving_reaches_the_app():
    seen = []

    async def app(scope: dict, receive: Receive, send: Send) -> None:
        seen.extend([await receive(), await receive()])

    assert await post(app, request(teacher_budget=0.1)) is None
    assert [message["type"] for message in seen] == ["http.request", "http.disconnect"]


async def test_leaving_amid_the_body_ends_the_request():
    upstream = Upstream()
    incoming = [{"type": "http.request", "body": b'{"model', "more_body": True}, DISCONNECT]

    async def receive() -> dict:
        return incoming.pop(0)

    async def send(message: dict) -> None:
        pytest.fail("nobody is there")

    scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": []}
    await TeacherFields(upstream)(scope, receive, send)
    assert upstream.calls == 0


async def test_the_answer_to_nobody_is_passed_on():
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


# JSON responses

TWO_OF_TEN = Report(completion_tokens=10, tokens=2, calls=1, spans=[[3, 5]], finished=True)
FIVE_OF_TEN = Report(completion_tokens=10, tokens=5, calls=2, spans=[[0, 4], [9, 10]], finished=True)


async def test_a_response_carries_the_report():
    body = json.dumps({"id": "cmpl-1", "choices": [{"index": 0, "text": "für 5 €"}]}).encode()
    answer = await post(Upstream(chunks=(body,), reports=(TWO_OF_TEN,)), request())
    assert answer.json == {
        "id": "cmpl-1",
        "choices": [{"index": 0, "text": "für 5 €"}],
        "teacher": {
            "tokens": 2,
            "calls": 1,
            "rate": 0.2,
            "spans": [[3, 5]],
            "denied": {},
            "degraded": False,
            "clamped": False,
        },
    }


async def test_the_lengths_and_the_other_headers_are_right():
    answer = await post(Upstream(chunks=(b'{"a":', b" 1}")), request())
    assert answer.headers[b"content-length"] == str(len(answer.body)).encode()
    assert answer.headers[b"x-request-id"] == b"17"
    assert answer.json.keys() == {"a", "teacher"}


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
async def test_a_response_without_choices_carries_the_report(path):
    answer = await post(Upstream(chunks=(b'{"output": []}',), reports=(TWO_OF_TEN,)), request(), path=path)
    assert answer.json["teacher"]["tokens"] == 2


async def test_several_choices_have_their_own_reports():
    choices = [{"index": 1, "text": "b"}, {"index": 0, "text": "a"}]
    upstream = Upstream(
        chunks=(json.dumps({"choices": choices}).encode(),), reports=(TWO_OF_TEN, FIVE_OF_TEN)
    )
    answer = await post(upstream, request(n=2))
    by_text = {choice["text"]: choice["teacher"] for choice in answer.json["choices"]}
    assert (by_text["a"]["tokens"], by_text["a"]["spans"]) == (2, [[3, 5]])
    assert (by_text["b"]["tokens"], by_text["b"]["spans"]) == (5, [[0, 4], [9, 10]])
    assert answer.json["teacher"] == {
        "tokens": 7,
        "calls": 3,
        "rate": 0.35,
        "spans": [],
        "denied": {},
        "degraded": False,
        "clamped": False,
    }


@pytest.mark.parametrize(
    ("status", "content_type"), [(400, "application/json"), (502, "application/json"), (200, "text/plain")]
)
async def test_errors_and_other_types_are_not_touched(status, content_type):
    chunks = (b'data: {"error": ', b'"x"}')
    answer = await post(Upstream(status, content_type, chunks), request(teacher_budget=0.1))
    assert answer.status == status
    assert answer.chunks[:2] == list(chunks)


# Streams


def event(document: Any) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def delta(text: str, index: int = 0) -> bytes:
    return event({"id": "cmpl-1", "choices": [{"index": index, "text": text}]})


def stream(*chunks: bytes, **more: Any) -> Upstream:
    return Upstream(content_type="text/event-stream; charset=utf-8", chunks=chunks, **more)


async def test_every_chunk_of_a_stream_names_its_source():
    sources = ["student", "teacher", "student"]

    def hand_out(index: int, exchange: Exchange) -> None:
        if index < 3:
            exchange.hand_out(exchange.reports[0], sources[index], finished=index == 2)

    report = Report(completion_tokens=3, tokens=1, calls=1, spans=[[1, 2]])
    answer = await post(
        stream(
            delta("a"), delta("b"), delta("c"), b"data: [DONE]\n\n", reports=(report,), before_chunk=hand_out
        ),
        request(stream=True),
    )
    assert [e["source"] for e in answer.events] == sources
    assert [e["choices"][0]["text"] for e in answer.events] == ["a", "b", "c"]
    assert ["teacher" in e for e in answer.events] == [False, False, True]
    assert answer.events[2]["teacher"]["spans"] == [[1, 2]]
    assert answer.chunks[3] == b"data: [DONE]\n\n"


@pytest.mark.parametrize("first", [{"id": "cmpl-1"}, {"object": "chunk"}], ids=["not parsed", "parsed"])
@pytest.mark.parametrize("finished", [False, True])
async def test_an_event_that_is_not_parsed_says_the_same(first, finished):
    """The event of vLLM that starts with its id gets its source without a look at the rest."""
    document = first | {"choices": [{"index": 0, "text": 'für 5 €", "source": "x'}], "usage": None}
    chunk = b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"
    report = Report(10, 2, source="teacher", finished=finished)
    answer = await post(stream(chunk, reports=(report,)), request(stream=True))
    (got,) = answer.events
    assert got.pop("source") == "teacher"
    assert got.pop("teacher", None) == (report.as_dict() if finished else None)
    assert got == document
    assert answer.chunks[0].endswith(b"}\n\n")


async def test_the_choices_of_a_stream_have_their_own_sources_and_reports():
    def hand_out(index: int, exchange: Exchange) -> None:
        exchange.hand_out(exchange.reports[index % 2], ["student", "teacher"][index % 2], finished=index > 1)

    answer = await post(
        stream(
            delta("a", 0),
            delta("b", 1),
            delta("c", 0),
            delta("d", 1),
            reports=(Report(10, 2), Report(10, 5)),
            before_chunk=hand_out,
        ),
        request(stream=True, n=2),
    )
    assert [e["source"] for e in answer.events] == ["student", "teacher", "student", "teacher"]
    assert [e.get("teacher", {}).get("tokens") for e in answer.events] == [None, None, 2, 5]


async def test_the_usage_chunk_carries_the_total():
    upstream = stream(event({"choices": [], "usage": {"total_tokens": 9}}), reports=(TWO_OF_TEN, FIVE_OF_TEN))
    (usage,) = (await post(upstream, request(stream=True))).events
    assert (usage["usage"], usage["teacher"]["tokens"]) == ({"total_tokens": 9}, 7)


async def test_events_without_choices_carry_the_total_when_all_is_written():
    """As /v1/responses and /v1/messages stream them, with the event's name on a line of its own."""

    def hand_out(index: int, exchange: Exchange) -> None:
        exchange.hand_out(exchange.reports[0], "teacher", finished=index == 1)

    chunks = [b"event: " + name + b"\n" + event({"type": name.decode()}) for name in (b"delta", b"stop")]
    answer = await post(
        stream(*chunks, reports=(Report(10, 2),), before_chunk=hand_out), request(), path="/v1/messages"
    )
    assert [e["source"] for e in answer.events] == ["teacher", "teacher"]
    assert ["teacher" in e for e in answer.events] == [False, True]
    assert answer.chunks[1].startswith(b"event: stop\ndata: {")
    assert answer.chunks[1].endswith(b"}\n\n")


async def test_several_events_may_come_in_one_chunk():
    answer = await post(stream(delta("a") + delta("b") + b"data: [DONE]\n\n"), request(stream=True))
    assert [e["source"] for e in answer.events] == ["student", "student"]
    assert answer.chunks[0].endswith(b"\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize("line", [b": ping\n\n", b"data: [DONE]\n\n", event({"error": {"message": "x"}})])
async def test_comments_endings_and_errors_are_not_touched(line):
    assert (await post(stream(line), request(stream=True))).chunks[0] == line


# Streams that fail

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
LOST = GracefulHTTPError("the teacher failed: gone", HTTPStatus.BAD_GATEWAY)
CREATED = b"event: response.created\n" + event({"type": "response.created", "sequence_number": 0})
PROGRESS = b"event: response.in_progress\n" + event({"type": "response.in_progress", "sequence_number": 1})
DELTA = b"event: response.output_text.delta\n" + event({"type": "x", "sequence_number": 2, "delta": "a"})
TEXT = b"event: content_block_delta\n" + event({"type": "content_block_delta"})
# What vLLM sends after the failure, by surface; None: it raises.
VLLMS_END = {
    COMPLETIONS: event({"error": {"message": "the teacher failed: gone", "code": 502}}),
    RESPONSES: None,
    MESSAGES: b"event: error\n" + event({"type": "error", "error": {"message": "2 validation errors"}}),
}
FIRST = {COMPLETIONS: delta("a"), RESPONSES: DELTA, MESSAGES: TEXT}


def failing(path: str, *before: bytes, error: Exception = LOST, noted: bool = True) -> Any:
    """An app of vLLM's whose engine fails after it has sent ``before``."""
    end = VLLMS_END[path]

    async def app(scope: dict, receive: Receive, send: Send) -> None:
        exchange = EXCHANGE.get()
        exchange.open()
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for chunk in before:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        exchange.failure = error if noted else None
        if end is None:
            raise RuntimeError("response already started") from error
        await send({"type": "http.response.body", "body": end, "more_body": True})
        await send({"type": "http.response.body"})

    return app


@pytest.mark.parametrize("path", VLLMS_END)
async def test_a_failure_after_the_first_token_is_the_last_event(path):
    REQUEST_ID.set("order-7")
    opening = (CREATED, PROGRESS) if path == RESPONSES else ()
    answer = await post(failing(path, *opening, FIRST[path]), request(stream=True), path=path)
    assert answer.status == 200
    *_, last = answer.events
    assert len(answer.events) == len(opening) + 2
    assert last["error"]["message"] == "the teacher failed: gone"
    if path == MESSAGES:
        error = {"type": "api_error", "message": "the teacher failed: gone"}
        assert last == {"type": "error", "error": error, "request_id": "order-7"}
        assert b"event: error\ndata: {" in answer.body
    if path == RESPONSES:
        assert (last["type"], last["sequence_number"], last["code"]) == ("error", 3, "502")
        assert last["message"] == "the teacher failed: gone"
        assert answer.chunks[-1].startswith(b"event: error\ndata: {")
        assert answer.body.endswith(b"}\n\n")


@pytest.mark.parametrize(
    ("error", "status", "type_"),
    [
        (LOST, 502, "api_error"),
        (VLLMValidationError("no", parameter="top_p"), 400, "invalid_request_error"),
        (RuntimeError("dead"), 500, "api_error"),
    ],
    ids=["teacher", "validation", "engine"],
)
@pytest.mark.parametrize("path", VLLMS_END)
async def test_a_failure_before_the_first_token_has_its_status(path, error, status, type_):
    opening = (CREATED, PROGRESS) if path == RESPONSES else ()
    answer = await post(failing(path, *opening, error=error), request(stream=True), path=path)
    assert (answer.status, len(answer.chunks)) == (status, 1)
    assert answer.headers[b"content-type"] == b"application/json"
    if path == MESSAGES:
        assert (answer.json["type"], answer.json["error"]["type"]) == ("error", type_)
    else:
        assert answer.json["error"]["code"] == status


@pytest.mark.parametrize("path", VLLMS_END)
async def test_a_failure_that_the_engine_knows_nothing_of_shows_nothing_of_the_inside(path):
    secret = ValueError("2 validation errors, at /home")
    answer = await post(
        failing(path, FIRST[path], error=secret, noted=False), request(stream=True), path=path
    )
    if path != COMPLETIONS:  # there it is vLLM's own last event
        assert answer.events[-1]["error"]["message"] == "Internal server error"
    assert b"/home" not in answer.body


async def test_what_breaks_before_a_response_is_vllms_to_answer():
    async def app(scope: dict, receive: Receive, send: Send) -> None:
        raise RuntimeError("not begun")

    with pytest.raises(RuntimeError, match="not begun"):
        await post(app, request(stream=True), path=RESPONSES)


async def test_a_comment_that_keeps_the_connection_alive_is_not_held_back():
    answer = await post(stream(b": keep-alive\n\n", VLLMS_END[COMPLETIONS]), request(stream=True))
    assert answer.chunks[0] == b": keep-alive\n\n"


@pytest.mark.parametrize(("status", "noted"), [(502, True), (400, True), (500, False)])
async def test_anthropics_clients_get_anthropics_names(status, noted):
    """vLLM has the shape, with the type names of OpenAI's."""
    said = json.dumps({"type": "error", "error": {"type": "Bad Gateway", "message": "broken"}}).encode()
    error = GracefulHTTPError("broken", HTTPStatus(status)) if noted else None

    def note(_: int, exchange: Exchange) -> None:
        exchange.failure = error

    upstream = Upstream(status, chunks=(said,), before_start=lambda exchange: note(0, exchange))
    answer = await post(upstream, request(), path=MESSAGES)
    expected = "invalid_request_error" if status == 400 else "api_error"
    assert (answer.status, answer.json["error"]) == (status, {"type": expected, "message": "broken"})
    elsewhere = Upstream(status, chunks=(said,), before_start=lambda exchange: note(0, exchange))
    assert (await post(elsewhere, request())).body == said


async def test_what_vllm_itself_refuses_stays_in_its_words():
    said = b'{"error": {"type": "Bad Request"}}'
    assert (await post(Upstream(400, chunks=(said,)), request(), path=MESSAGES)).body == said


# Beam search


async def test_a_beam_search_is_counted_by_what_comes_of_it():
    """The engine sees nothing but steps; the response has the choices."""
    counted: list[list[Report]] = []
    body = {"choices": [{"index": 0}, {"index": 1}], "usage": {"completion_tokens": 9}}

    def search(_: int, exchange: Exchange) -> None:
        exchange.searched = counted.append

    upstream = Upstream(chunks=(json.dumps(body).encode(),), reports=(), before_chunk=search)
    answer = await post(upstream, request(use_beam_search=True, n=2))
    ((first, second),) = counted
    assert first.completion_tokens + second.completion_tokens == 9
    assert (first.finished, second.finished) == (True, True)
    assert [choice["teacher"]["tokens"] for choice in answer.json["choices"]] == [0, 0]


# The OpenAPI document


@pytest.fixture
def documented() -> dict[str, Any]:
    """The document of an app that has all paths but one, of which one has no schema."""
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
    assert parts["properties"].keys() == {"fraction", "tokens", "calls"}
    assert [some["required"] for some in parts["anyOf"]] == [["fraction"], ["tokens"], ["calls"]]
    assert nothing == {"type": "null"}
    bodies = [schema for name, schema in schemas.items() if name.startswith("Request")]
    assert len(bodies) == len(PATHS) - 1
    assert sum("teacher_budget" in schema["properties"] for schema in bodies) == len(bodies) - 1


def test_the_report_is_documented_on_every_path(documented):
    assert documented["paths"].keys() == {*PATHS} - {ALONE[-1]}
    report = documented["components"]["schemas"]["Teacher"]
    assert report["properties"].keys() == Report().as_dict().keys()
    assert set(report["required"]) == Report().as_dict().keys()
    for path, operations in documented["paths"].items():
        responses = operations["post"]["responses"]
        assert responses["200"]["content"]["application/json"]["schema"]["required"] == ["teacher"]
        streamed = responses["200"]["content"]["text/event-stream"].get("schema", {}).get("properties", {})
        assert streamed.keys() == ({"source", "teacher"} if path in STREAMED else set())
        assert responses["503"] == {"description": "vLLM's"}
        assert {"401", "429", "502"} < responses.keys()
