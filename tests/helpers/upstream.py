"""Stand-ins for vLLM's app, on which our middleware is put, and for its client."""

import json
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from server.exchange import EXCHANGE, Exchange, Report
from server.http.fields import TeacherFields

Receive = Callable[[], Awaitable[dict]]
Send = Callable[[dict], Awaitable[None]]

DISCONNECT = {"type": "http.disconnect"}
COMPLETIONS = "/v1/completions"


@dataclass
class Upstream:
    """A stand-in for vLLM's app: it notes the requests that reach it, and sends what a test sets."""

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
        # ASGI's messages may leave out fields with their defaults: an empty body, and no more of it.
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
    headers: Iterable[tuple[str, str]] = (),
    more: dict[str, Any] | None = None,
) -> Answer | None:
    """Send a request through the middleware. The client disconnects after its body. None: no answer.

    ``more`` goes into the request's scope.
    """
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

    sent_headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    scope = {"type": kind, "method": method, "path": path, "root_path": root_path, "headers": sent_headers}
    scope |= more or {}
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
