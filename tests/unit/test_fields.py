import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from router.budget import Budget
from server.exchange import EXCHANGE, Exchange, Report
from server.http.fields import ALONE, PATHS, STREAMED, TeacherFields, document

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
    app: Any, *chunks: bytes, path: str = COMPLETIONS, method: str = "POST", kind: str = "http"
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

    await TeacherFields(app)({"type": kind, "method": method, "path": path, "headers": []}, receive, send)
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


@pytest.mark.parametrize("body", [b"", b"{", b'"text"', b"[1]", b"\xff\xfe\x00", b"17"])
async def test_what_is_no_request_is_left_to_vllm(body):
    upstream = Upstream()
    await post(upstream, body)
    assert upstream.body == body
    assert upstream.exchange.budget is None


@pytest.mark.parametrize(
    "body",
    [
        b'{"teacher_budget": 0, "top_p": NaN}',
        b'{"teacher_budget": 0, "prompt": "\\ud800"}',
        '{"teacher_budget": 0, "prompt": "Hi"}'.encode("utf-16"),
        b'{"teacher_budget": 1, "teacher_budget": 0}',
    ],
    ids=["NaN", "half a character", "UTF-16", "twice"],
)
async def test_every_body_that_vllm_can_read_has_its_budget_read(body):
    """vLLM reads bodies with `json.loads`, which is lenient; a stricter reader would miss a budget of 0."""
    upstream = Upstream()
    await post(upstream, body)
    assert upstream.exchange.budget == Budget(fraction=0)
    assert "teacher_budget" not in json.loads(upstream.body)


async def test_a_parameter_that_the_engine_never_sees_is_noted():
    upstream = Upstream()
    await post(upstream, request(use_beam_search=True))
    assert upstream.exchange.unsupported == "use_beam_search"
    await post(upstream, request(use_beam_search=False, teacher_budget=0.1))
    assert upstream.exchange.unsupported is None
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
        ({"\ud800": 3}, "teacher_budget: Input should be a valid string"),
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
