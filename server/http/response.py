"""Adds fields to vLLM's responses: `teacher` in bodies and last events, `source` in every event."""

import logging
from collections.abc import Iterable
from typing import Any, Literal

import msgspec
from starlette.requests import ClientDisconnect

from server.exchange import Exchange, Report, ReportFields
from server.http.asgi import Message, Send, route_path
from server.http.errors import ApiError, refuse, speaks_anthropic
from server.sessions import SessionFields

logger = logging.getLogger(__name__)

# Start of a chunk of a chat completion or completion; an error starts differently.
PLAIN_EVENTS = b'data: {"id":'
# Starts of the events that /v1/responses streams before it asks the engine for anything.
OPENING_EVENTS = (b"event: response.created\n", b"event: response.in_progress\n")
INTERNAL = ApiError(500, "Internal server error")


class AnnotatedResponse:
    """The `send` of one request: adds reports to vLLM's response, and ends a stream that breaks off.

    A response's start is held back until it is certain that no error replaces it.
    """

    def __init__(self, exchange: Exchange, scope: Message, send: Send) -> None:
        self.exchange = exchange
        self.scope = scope
        self.send = send
        self.path = route_path(scope)
        self.kind: Literal["json", "stream", "error"] | None = None
        """Kind of vLLM's response; None if it is passed on unchanged."""
        self.held: list[Message] = []
        self.ended = False
        self.next_event = 0
        """The sequence number of the next event, as /v1/responses counts them."""
        self.session: SessionFields | None = None
        """Report of the session, as of the last time when all choices had ended."""
        self._session_shares = -1

    async def __call__(self, message: Message) -> None:
        """Pass a part of the response on, with our fields."""
        if self.ended:
            return
        if message["type"] == "http.response.start":
            self.kind = self._kind(message)
        if self.kind is None:
            await self.send(message)
        elif self.kind == "stream":
            await self._stream(message)
        else:
            self.held.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                await (self._json() if self.kind == "json" else self._error())

    async def break_off(self, error: Exception) -> bool:
        """End a stream that vLLM left open with ``error``; False if the response is no stream."""
        if self.ended:
            return True
        if self.kind != "stream" or isinstance(error, ClientDisconnect):
            return False
        if self.exchange.failure is None:
            logger.error("a stream broke off", exc_info=error)
        if self.held:
            await self._refuse(self._failure)
        else:
            self.ended = True
            event = self._failure.event(self.path, self.next_event)
            await self.send({"type": "http.response.body", "body": event})
        return True

    def _kind(self, start: Message) -> Literal["json", "stream", "error"] | None:
        content_type = dict(start["headers"]).get(b"content-type", b"")
        if content_type.startswith(b"text/event-stream"):
            return "stream"
        if not content_type.startswith(b"application/json"):
            return None
        if start["status"] == 200:
            return "json"
        # vLLM knows Anthropic's shape, but not the names in it. vLLM's own refusals keep its words.
        ours = self.exchange.failure is not None or start["status"] >= 500
        return "error" if ours and speaks_anthropic(self.path) else None

    @property
    def _failure(self) -> ApiError:
        failure = self.exchange.failure
        return INTERNAL if failure is None else ApiError.of(failure)

    async def _refuse(self, error: ApiError) -> None:
        """Send an error in place of the messages that are held back."""
        self.ended = True
        await refuse(self.scope, self.send, error)

    async def _error(self) -> None:
        error = self._failure
        if self.exchange.failure is None:
            said = _decoded(self.held)
            message = said.get("error", {}).get("message") if isinstance(said, dict) else None
            error = ApiError(self.held[0]["status"], message or error.message)
        await self._refuse(error)

    async def _json(self) -> None:
        start, *rest = self.held
        response = _decoded(rest)
        await self._ask_session()
        if isinstance(response, dict):  # vLLM answers null to a client that has left
            self._report(response)
        body = msgspec.json.encode(response)
        headers = [(name, value) for name, value in start["headers"] if name != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        self.ended = True
        await self.send({**start, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    def _report(self, response: dict[str, Any]) -> None:
        choices = response.get("choices", ())
        self.exchange.end_search(len(choices), (response.get("usage") or {}).get("completion_tokens", 0))
        reports = self.exchange.reports
        if len(reports) > 1:
            for choice in choices:
                choice["teacher"] = reports[choice["index"]].as_dict()
        response["teacher"] = self._fields(self.exchange.total())

    async def _stream(self, message: Message) -> None:
        if not self.held and message["type"] == "http.response.body":
            return await self._pass_on(message)
        self.held.append(message)
        if message["type"] == "http.response.start" or message.get("body", b"").startswith(OPENING_EVENTS):
            return
        if self.exchange.failure is not None:
            return await self._refuse(self._failure)
        held = self.held
        self.held = []
        for message in held:
            await self._pass_on(message)

    async def _pass_on(self, message: Message) -> None:
        """Send a message of a stream, with our fields in its events."""
        if message.get("body"):
            if self.exchange.finished:
                await self._ask_session()
            message["body"] = b"\n".join(map(self._event, message["body"].split(b"\n")))
        await self.send(message)

    def _event(self, line: bytes) -> bytes:
        """One line of a server-sent event."""
        if not line.startswith(b"data: {"):
            return line
        reports = self.exchange.reports
        if len(reports) == 1 and not reports[0].finished and line.startswith(PLAIN_EVENTS):
            # This is nearly every event of nearly every stream. Nothing in it is needed, so it is not parsed.
            return b'data: {"source":"%s",%s' % (reports[0].source.encode(), line[len(b"data: ") + 1 :])
        event = msgspec.json.decode(line[len(b"data: ") :])
        if "error" in event:
            return self._error_event(line)
        self.next_event = event.get("sequence_number", 0) + 1
        choices = event.get("choices")
        report = self.exchange.reports[choices[0]["index"]] if choices else self.exchange.latest
        event["source"] = report.source
        if choices and report.finished:
            event["teacher"] = self._fields(report)
        elif not choices and self.exchange.finished:
            event["teacher"] = self._fields(self.exchange.total())
        return b"data: " + msgspec.json.encode(event)

    async def _ask_session(self) -> None:
        """Ask the ledger what the request's session has spent, once for each number of choices."""
        session = self.exchange.session
        if session is not None and self._session_shares != len(session.shares):
            self._session_shares = len(session.shares)
            self.session = await session.report()

    def _fields(self, report: Report) -> ReportFields:
        """A report's fields, with the session if all choices have ended."""
        fields = report.as_dict()
        if self.session is not None and self.exchange.finished:
            fields["session"] = self.session
        return fields

    def _error_event(self, line: bytes) -> bytes:
        """The last event of a failed stream. For Anthropic's clients, it replaces vLLM's internal error."""
        if not speaks_anthropic(self.path):
            return line
        return b"data: " + msgspec.json.encode(self._failure.document(self.path))


def _decoded(messages: Iterable[Message]) -> Any:
    """The JSON that the messages of a response hold together."""
    return msgspec.json.decode(b"".join(message.get("body", b"") for message in messages))
