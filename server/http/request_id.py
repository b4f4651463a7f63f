"""X-Request-Id: from the request or generated; passed to vLLM, the teacher, the response and the log."""

import logging
import re
import uuid
from typing import Any

from server.http.asgi import REQUEST_ID, App, Message, Receive, Send, encoded
from server.http.errors import ApiError, refuse

HEADER = "x-request-id"
# An id becomes part of request ids, log lines and headers of other servers.
PATTERN = re.compile(r"[!-~]{1,128}")
FORMAT = "%(levelname)s %(asctime)s [%(name)s] %(request_id)s%(message)s"


class RequestIds:
    """ASGI middleware: gives a request its id, in the context and its headers, and its response the same."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Give the request an id, which the response repeats."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        sent = dict(scope["headers"]).get(HEADER.encode())
        request_id = uuid.uuid4().hex if sent is None else sent.decode("latin-1")
        if not PATTERN.fullmatch(request_id):
            message = "X-Request-Id: expected 1 to 128 printable ASCII characters without spaces"
            return await refuse(scope, send, ApiError(400, message, "X-Request-Id"))
        if sent is None:
            scope = {**scope, "headers": [*scope["headers"], (HEADER.encode(), request_id.encode())]}
        REQUEST_ID.set(request_id)

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [pair for pair in message["headers"] if pair[0].lower() != HEADER.encode()]
                message = {**message, "headers": [*headers, *encoded({HEADER: request_id})]}
            await send(message)

        await self.app(scope, receive, tell)


def log_with_ids(stream: Any = None) -> None:
    """Let the gateway's own loggers write to ``stream`` (default: stderr), with each line's request id."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(FORMAT, "%m-%d %H:%M:%S"))
    handler.addFilter(_identify)
    for name in ("server", "router"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)  # of its own: a library that vLLM imports sets the root's to ERROR
        logger.propagate = False


def _identify(record: logging.LogRecord) -> bool:
    request_id = REQUEST_ID.get()
    record.request_id = "" if request_id is None else f"{request_id}: "
    return True
