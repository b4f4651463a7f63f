"""Shutdown: clients reconnect elsewhere, running requests are finished, new ones are refused."""

import asyncio
import logging
import signal
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any

from router.errors import RunEnded
from server.http.asgi import App, Message, Receive, Send, route_path
from server.http.errors import ApiError, refuse

logger = logging.getLogger(__name__)

READS = ("GET", "HEAD", "OPTIONS")
HAND_OVER_SECONDS = 5
"""Seconds that requests are still answered after SIGTERM, each with `Connection: close`. A client that keeps
its connection busy opens its next one elsewhere, and loses nothing. When the gateway closes the other
connections, they have been idle for as long as clients keep them (OpenAI's: 5 s).
"""
CUT_OFF_SECONDS = 5
"""Seconds that a request has to give back what it holds after it was cut off."""
KEEP_ALIVE_SECONDS = 75
"""Seconds that idle connections are kept. Load balancers (mostly 60 s) and clients keep them for less time.
Otherwise the gateway would close a connection on which a request may be on its way.
"""


class EngineDied(RunEnded):
    """The student's engine died; the gateway must be restarted."""


class Lifecycle:
    """Outermost ASGI middleware: tracks every request, and shuts the server down in order.

    SIGTERM drains, in this order:

    - `/ready` fails, and clients are handed over. This takes `HAND_OVER_SECONDS`, or half of
      ``drain_seconds``, or no time if no client is connected.
    - New work is refused with 503. Running requests are written to their ends, with all their segments
      and teacher calls.
    - The server stops.

    vLLM's own shutdown does not work here. At SIGTERM, its engine aborts running requests or refuses new
    ones, and the student's next segment is a new request. So the engine is not told before the last request
    has ended. Connections are closed after ``drain_seconds``, at a second signal, and at SIGINT, which a
    terminal sends to the engine's process too. Their requests are then aborted and settled.
    """

    def __init__(self, app: App, *, drain_seconds: float) -> None:
        self.app = app
        self.drain_seconds = drain_seconds
        self.cut_off = 0
        """Number of requests that were cut off."""
        self.interrupted = False
        self._refuses = False
        self._requests: set[asyncio.Task[Any]] = set()
        self._server: Any = None
        self._drain: asyncio.Task[None] | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Note the request while it runs, or refuse it."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if self._drain is not None:
            if scope["type"] == "websocket":
                return await send({"type": "websocket.close", "code": 1012})
            # Probes and scrapers get answers to the end. Only `/ready` fails: no client should send more.
            if route_path(scope) == "/ready" or (self._refuses and scope["method"] not in READS):
                error = ApiError(503, "the gateway is shutting down and accepts no new requests")
                return await refuse(scope, send, error, {"retry-after": "1", "connection": "close"})
            send = _closing(send)
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a request runs outside of a task")
        self._requests.add(task)
        try:
            await self.app(scope, receive, send)
        finally:
            self._requests.discard(task)

    async def run(self, state: Any, serving: Awaitable[Any]) -> None:
        """Run vLLM's ``serve_http`` until a signal, or the engine's death, ends it.

        ``state``: the app's state, in which `serve_http` puts uvicorn's server.
        """
        task = asyncio.ensure_future(serving)
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0)  # it installs its signal handlers before it first waits: ours take their place
        self._server = state.server
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.signal, number)
        await (await task)

    def signal(self, number: int) -> None:
        """Begin the shutdown; SIGINT or a second signal ends it at once."""
        self.interrupted = self.interrupted or self._drain is not None or number == signal.SIGINT
        if self._drain is None:
            self._patience = asyncio.timeout(0 if self.interrupted else self.drain_seconds)
            self._drain = asyncio.create_task(self._end())
        else:
            with suppress(RuntimeError):  # its time is over already
                self._patience.reschedule(asyncio.get_running_loop().time())

    async def _end(self) -> None:
        with suppress(TimeoutError):
            async with self._patience:
                logger.warning("shutting down, running requests: %d", len(self._requests))
                await self._hand_over()
                while self._requests:
                    await asyncio.wait(set(self._requests))
        if self._requests:
            self.cut_off = len(self._requests)
            for connection in list(self._server.server_state.connections):
                connection.transport.abort()
            await asyncio.wait(set(self._requests), timeout=CUT_OFF_SECONDS)
        self._server.should_exit = True

    async def _hand_over(self) -> None:
        try:
            if self._server.server_state.connections:
                await asyncio.sleep(min(HAND_OVER_SECONDS, self.drain_seconds / 2))
        finally:
            self._refuses = True


def _closing(send: Send) -> Send:
    """A `send` that tells the client that its connection ends with this response."""

    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        await send(message)

    return closing
