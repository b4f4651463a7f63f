"""Shared by the ASGI middlewares: the protocol's types, a request's path and its id."""

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextvars import ContextVar
from typing import Any

from starlette._utils import get_route_path

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The `X-Request-Id` of the current request."""


def route_path(scope: Message) -> str:
    """The path that Starlette picks the handler by: without the root path, if the client sent that too."""
    return get_route_path(scope)


def encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Headers as ASGI takes them: pairs of bytes."""
    return [(name.encode(), value.encode()) for name, value in headers.items()]
