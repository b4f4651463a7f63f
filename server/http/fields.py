"""Reads a request's budget from a field or a header, and opens the exchange that carries it."""

import json
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from router.budget import Budget
from router.errors import BadRequest
from router.problems import problem
from server.exchange import EXCHANGE, NO_PRICES, Exchange
from server.http.access import owner_of
from server.http.asgi import App, Message, Receive, Send, route_path
from server.http.errors import RESPONSES, ApiError, refuse
from server.http.json_body import read_body
from server.http.names import names_as_sent
from server.http.response import AnnotatedResponse
from server.sessions import SessionBudget
from server.tenants import Tenant

STREAMED = ("/v1/chat/completions", "/v1/completions", RESPONSES, "/v1/messages")
# The student alone answers requests to these paths: they return no completion, or do not pass the gate.
ALONE = ("/generative_scoring", "/v1/systemone", "/inference/v1/generate", "/cohere/v2/chat")
# /invocations is SageMaker's name for any of them.
PATHS = (*STREAMED, "/v1/chat/completions/batch", "/invocations", *ALONE)
FIELD = "teacher_budget"
HEADER = "X-Teacher-Budget"
SESSION_FIELD = "teacher_session"
SESSION_HEADER = "X-Teacher-Session"
SESSION_EXPECTED = 'expected an id of letters, digits and ._:-, or an object with "id", "tokens", "cost"'
EXPECTED = (
    'expected a fraction in [0, 1], or an object with "fraction", "tokens", "calls", "cost", "teachers"'
)
_FLAG = TypeAdapter(bool)


class TeacherFields:
    """ASGI middleware: takes the budget out of the request, puts the report into the response.

    All APIs of vLLM pass through it, so a new one only needs its path here. The `Exchange` with budget and
    reports goes to the engine in a context variable.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Take the gateway's fields out of the request, and pass the rest on."""
        path = route_path(scope) if scope["type"] == "http" else None
        if path not in PATHS or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        body = await _read(receive)
        if body is None:  # the client left before it had sent everything
            return None
        try:
            exchange, body = _open_exchange(body)
            _read_header(scope, exchange)
            _read_session_header(scope, exchange)
            owner = owner_of(scope)
            exchange.tenant = owner if isinstance(owner, Tenant) else None
            await _open_session(scope, exchange)
        except BadRequest as error:
            return await refuse(scope, send, ApiError.of(error))
        if path in ALONE:
            exchange.unsupported = path
        EXCHANGE.set(exchange)
        response = AnnotatedResponse(exchange, scope, send)
        try:
            await self.app(scope, _replay(body, receive), response)
        except Exception as error:
            if not await response.break_off(error):
                raise


class _Opened(NamedTuple):
    exchange: Exchange
    body: bytes
    """The request's body without the gateway's fields."""


def _open_exchange(body: bytes) -> _Opened:
    """The exchange of a request body, and the body without the gateway's fields.

    Raises:
        BadRequest: the body is not JSON, `teacher_budget` or `teacher_session` is not usable, or `background`
            is set.
    """
    request = read_body(body)
    if not isinstance(request, dict):
        return _Opened(Exchange(), body)  # vLLM says what is wrong with it
    if _is_set(request, "background"):
        # vLLM would keep it in this process: another gateway, or the next one, knows nothing of it.
        raise BadRequest(
            "background",
            "background is not supported, because a gateway stores no responses: wait for it, or stream it",
        )
    searches = _is_set(request, "use_beam_search")
    model = request.get("model")
    exchange = Exchange(
        unsupported="use_beam_search" if searches else None,
        searches=searches,
        writes_nothing=_is_set(request, "echo") and request.get("max_tokens") == 0,
        model=model if isinstance(model, str) else "",
        names=names_as_sent(request),
    )
    if FIELD not in request and SESSION_FIELD not in request:
        return _Opened(exchange, body)
    exchange.budget = _budget(FIELD, request.pop(FIELD, None))
    exchange.asked_session = _session(SESSION_FIELD, request.pop(SESSION_FIELD, None))
    return _Opened(exchange, json.dumps(request).encode())


def _read_header(scope: Message, exchange: Exchange) -> None:
    """Take the budget from the header, if the body has none. A header that is no budget is always refused."""
    text = _header(scope, HEADER)
    if text is None:
        return
    try:
        value = read_body(text)
    except BadRequest as error:
        shown = json.dumps(text.decode("latin-1")[:80])
        raise BadRequest(HEADER, f"{HEADER}: neither a number nor JSON: {shown}; {EXPECTED}") from error
    budget = _budget(HEADER, value)
    if exchange.budget is None and budget is not None:
        exchange.budget = budget
        exchange.budget_name = HEADER


def _read_session_header(scope: Message, exchange: Exchange) -> None:
    """Take the session from the header, if the body has none: an id as it is, or what the field takes."""
    text = _header(scope, SESSION_HEADER)
    if text is None:
        return
    value: Any = text.decode("latin-1").strip()
    if value.startswith("{"):
        try:
            value = read_body(text)
        except BadRequest as error:
            problem = f"{SESSION_HEADER}: not JSON: {json.dumps(value[:80])}; {SESSION_EXPECTED}"
            raise BadRequest(SESSION_HEADER, problem) from error
    session = _session(SESSION_HEADER, value)
    if exchange.asked_session is None:
        exchange.asked_session = session
        exchange.session_name = SESSION_HEADER


def _header(scope: Message, name: str) -> bytes | None:
    """A header of the request; of several, as HTTP reads them."""
    values = [value for sent, value in scope["headers"] if sent == name.lower().encode()]
    return b", ".join(values) if values else None


async def _open_session(scope: Message, exchange: Exchange) -> None:
    """Open the session that the request names, if it names one. Raises BadRequest if it cannot be opened."""
    asked = exchange.asked_session
    if asked is None:
        return
    cooperation: Any = scope["app"].state.engine_client.cooperation
    name = exchange.session_name
    if asked.cost is not None and cooperation.prices is None:
        raise BadRequest(name, f"{name}.cost: {NO_PRICES}")
    exchange.session = await cooperation.shared.open_session(exchange.tenant, asked, name)


def _is_set(request: dict[str, Any], name: str) -> bool:
    """Whether a flag is true, as vLLM reads it: from texts and numbers too."""
    try:
        return _FLAG.validate_python(request.get(name) or False)
    except ValidationError:
        return False  # vLLM says what is wrong with it


def _budget(name: str, value: Any) -> Budget | None:
    """The budget that a field or a header of this name has. Raises BadRequest if it has something else."""
    try:
        return None if value is None else Budget.model_validate(value)
    except ValidationError as error:
        other = not isinstance(value, int | float | dict) or isinstance(value, bool)
        raise BadRequest(name, _explain(name, value, error, EXPECTED, unlike=other)) from error


def _session(name: str, value: Any) -> SessionBudget | None:
    """The session that a field or a header of this name has. Raises BadRequest if it has something else."""
    try:
        return None if value is None else SessionBudget.model_validate(value)
    except ValidationError as error:
        other = not isinstance(value, str | dict)
        raise BadRequest(name, _explain(name, value, error, SESSION_EXPECTED, unlike=other)) from error


def _explain(name: str, value: Any, error: ValidationError, expected: str, *, unlike: bool) -> str:
    found = []
    for entry in error.errors():
        found.append(problem(entry | {"loc": (name, *entry["loc"])}))
    if unlike:
        found = [f"{name}: not {json.dumps(value)[:80]}"]
    return f"{'; '.join(found)}; {expected}"


async def _read(receive: Receive) -> bytes | None:
    chunks: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` with the body as one message, and then the client's further messages (it may leave)."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
