"""Our fields in vLLM's protocol: `teacher_budget` in requests, `teacher` and `source` in responses."""

import json
from typing import Any

import msgspec
from pydantic import TypeAdapter, ValidationError

from router.budget import Budget
from server.exchange import EXCHANGE, Exchange, ReportFields
from server.http.access import owner_of
from server.http.asgi import Message, Receive, Send, refuse
from server.tenants import Tenant

STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
# Where the student alone answers: what is asked for is no completion, or never passes the gate.
ALONE = ("/generative_scoring", "/v1/systemone", "/inference/v1/generate", "/cohere/v2/chat")
# /invocations is SageMaker's name for any of them.
PATHS = (*STREAMED, "/v1/chat/completions/batch", "/invocations", *ALONE)
FIELD = "teacher_budget"
# Statuses of the gateway's own, beside vLLM's.
REFUSALS = {
    "401": "No API key, or not one that this gateway knows",
    "429": "A limit of the API key is used up",
    "502": "The teacher failed, and the gateway is to fail with it",
    "503": "The gateway is about to end",
}
# How a chunk of a chat completion or completion starts; an error does not.
PLAIN_EVENTS = b'data: {"id":'


class TeacherFields:
    """ASGI middleware: takes the budget out of the request, puts the report into the response.

    It stands before every surface of vLLM alike, so a new one needs its path here and no more. The
    `Exchange` that carries both travels to the engine in a context variable.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in PATHS:
            return await self.app(scope, receive, send)
        body = await _read(receive)
        if body is None:  # the client left before it had sent everything
            return None
        try:
            exchange, body = _take_budget(body)
        except Refused as error:
            return await refuse(send, 400, "BadRequestError", str(error), param=error.param)
        if scope["path"] in ALONE:
            exchange.unsupported = scope["path"]
        owner = owner_of(scope)
        exchange.tenant = owner if isinstance(owner, Tenant) else None
        EXCHANGE.set(exchange)
        return await self.app(scope, _replay(body, receive), _Annotator(exchange, send))


class Refused(Exception):
    """The gateway cannot do what ``param`` asks for; the message says why."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def _take_budget(body: bytes) -> tuple[Exchange, bytes]:
    """The exchange that a request body opens, and the body without our field.

    Raises:
        Refused: `teacher_budget` is neither a fraction nor a budget, or the request is for the background.
    """
    try:
        request = json.loads(body)  # vLLM's own reader: a stricter one would miss a budget
    except (ValueError, RecursionError):
        return Exchange(), body  # vLLM says what is wrong with it
    if not isinstance(request, dict):
        return Exchange(), body
    if request.get("background"):
        # vLLM would keep it in this process: another gateway, or the next one, knows nothing of it.
        raise Refused("background", "a gateway keeps no responses: wait for it, or stream it")
    unsupported = "use_beam_search" if request.get("use_beam_search") else None
    if FIELD not in request:
        return Exchange(unsupported=unsupported), body
    value = request.pop(FIELD)
    try:
        budget = None if value is None else Budget.model_validate(value)
    except ValidationError as error:
        raise Refused(FIELD, _explain(value, error)) from error
    return Exchange(budget=budget, unsupported=unsupported), json.dumps(request).encode()


def _explain(value: Any, error: ValidationError) -> str:
    problems = []
    for entry in error.errors():
        path = ".".join([FIELD, *map(str, entry["loc"])])
        problems.append(f"{path}: {entry['msg'].removeprefix('Value error, ')}")
    if not isinstance(value, int | float | dict) or isinstance(value, bool):
        problems = [f"{FIELD}: not {json.dumps(value)[:80]}"]
    expected = 'a fraction in [0, 1], or an object of "fraction", "tokens", "calls"'
    return f"{'; '.join(problems)}; expected {expected}"


async def _read(receive: Receive) -> bytes | None:
    chunks, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then whatever the client does next (it may leave)."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


class _Annotator:
    """The `send` of one request; writes the exchange's reports into what vLLM sends."""

    def __init__(self, exchange: Exchange, send: Send) -> None:
        self.exchange = exchange
        self.send = send
        self.start: Message | None = None  # held back while a JSON body, whose length will change, comes in
        self.chunks: list[bytes] = []
        self.streams = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            content_type = dict(message["headers"]).get(b"content-type", b"")
            self.streams = content_type.startswith(b"text/event-stream")
            if message["status"] == 200 and content_type.startswith(b"application/json"):
                self.start = message
                return
        elif message["type"] == "http.response.body":
            if self.start is not None:
                return await self._json(message)
            if self.streams and message.get("body"):
                message["body"] = b"\n".join(map(self._event, message["body"].split(b"\n")))
        await self.send(message)

    async def _json(self, message: Message) -> None:
        self.chunks.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        response = msgspec.json.decode(b"".join(self.chunks))
        reports = self.exchange.reports
        if len(reports) > 1:
            for choice in response.get("choices", ()):
                choice["teacher"] = reports[choice["index"]].as_dict()
        response["teacher"] = self.exchange.total().as_dict()
        body = msgspec.json.encode(response)
        headers = [(name, value) for name, value in self.start["headers"] if name != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self.send({**self.start, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    def _event(self, line: bytes) -> bytes:
        """One line of a server-sent event."""
        if not line.startswith(b"data: {"):
            return line
        reports = self.exchange.reports
        if len(reports) == 1 and not reports[0].finished and line.startswith(PLAIN_EVENTS):
            # Nearly every event of nearly every stream: nothing to read in it, so it is not parsed.
            return b'data: {"source":"%s",%s' % (reports[0].source.encode(), line[len(b"data: {") :])
        event = msgspec.json.decode(line[len(b"data: ") :])
        if "error" in event:
            return line
        choices = event.get("choices")
        report = self.exchange.reports[choices[0]["index"]] if choices else self.exchange.latest
        event["source"] = report.source
        if choices and report.finished:
            event["teacher"] = report.as_dict()
        elif not choices and self.exchange.finished:
            event["teacher"] = self.exchange.total().as_dict()
        return b"data: " + msgspec.json.encode(event)


def document(app: Any) -> None:
    """Put our fields into the app's OpenAPI document: `teacher_budget`, `teacher` and `source`."""
    vllms = app.openapi

    def openapi() -> dict[str, Any]:
        document = vllms()
        schemas = document["components"]["schemas"]
        schemas["TeacherBudget"] = {
            "title": "Teacher budget",
            "description": "Bound on teacher tokens: a fraction of the completion, or parts that all hold.",
            "anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, _BUDGET, {"type": "null"}],
        }
        schemas["Teacher"] = TypeAdapter(ReportFields).json_schema()
        for path in PATHS:
            if path not in document["paths"]:  # vLLM has it where it is switched on
                continue
            operation = document["paths"][path]["post"]
            if "requestBody" in operation:
                body = operation["requestBody"]["content"]["application/json"]["schema"]
                properties = schemas[body["$ref"].rsplit("/", 1)[1]]["properties"]
                properties[FIELD] = {"$ref": "#/components/schemas/TeacherBudget"}
            answer = operation["responses"]["200"]
            answer["content"] = _answer(answer.get("content", {}), streams=path in STREAMED)
            for status, when in REFUSALS.items():
                schema = {"$ref": "#/components/schemas/ErrorResponse"}
                content = {"application/json": {"schema": schema}}
                operation["responses"].setdefault(status, {"description": when, "content": content})
        return document

    app.openapi = openapi


# A budget of no part is refused, which its own schema does not say.
_BUDGET = Budget.model_json_schema() | {
    "anyOf": [{"required": [part], "properties": {part: {"type": "number"}}} for part in Budget.model_fields]
}


def _answer(content: dict[str, Any], *, streams: bool) -> dict[str, Any]:
    """vLLM's media types of a response, with our fields; vLLM itself says nothing of what is in them."""
    report = {"$ref": "#/components/schemas/Teacher"}
    body = {"type": "object", "properties": {"teacher": report}, "required": ["teacher"]}
    content = {**content, "application/json": {"schema": body}}
    if streams:
        chunk = {"source": {"enum": ["student", "teacher"]}, "teacher": report}
        described = "Server-sent events: JSON with who wrote what is new in it, in the last one the report."
        content["text/event-stream"] = {"schema": {"description": described, "properties": chunk}}
    return content
