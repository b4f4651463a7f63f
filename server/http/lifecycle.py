"""How the gateway ends: it finishes what it has begun, and takes nothing new meanwhile."""

import asyncio
import logging
import signal
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any

from server.http.asgi import Message, Receive, Send, refuse

logger = logging.getLogger(__name__)

READS = ("GET", "HEAD", "OPTIONS")
CUT_OFF_SECONDS = 5
"""So long have requests that are cut off to give back what they hold."""
KEEP_ALIVE_SECONDS = 75
"""So long are idle connections kept. Load balancers (mostly 60 s) and clients keep them for less; else the
gateway would close one on which a request may be on its way.
"""


class EngineDied(Exception):
    """The student's engine is gone: the gateway has to be started again."""


class Lifecycle:
    """ASGI middleware in front of everything: knows every request, and ends the server in order.

    SIGTERM drains: what makes work is refused with 503, what runs is written to its end with all its
    segments and teacher calls, and then the server stops. vLLM's own way would not do: at SIGTERM its engine
    aborts what it writes, or refuses whatever is added, and the student's next segment is an addition. So
    nobody tells the engine before the last request has ended. After ``drain_seconds``, at a second signal,
    and at SIGINT (which a terminal sends to the engine's process too) clients are hung up on, by which
    their requests are aborted and settled.
    """

    def __init__(self, app: Any, *, drain_seconds: float) -> None:
        self.app = app
        self.drain_seconds = drain_seconds
        self.cut_off = 0
        """Requests that did not come to their end."""
        self.interrupted = False
        self._requests: set[asyncio.Task[Any]] = set()
        self._server: Any = None
        self._drain: asyncio.Task[None] | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        # Probes and scrapers are answered to the end, but for the question whether to send more.
        if self._drain is not None and (scope.get("method") not in READS or scope["path"] == "/ready"):
            if scope["type"] == "websocket":
                return await send({"type": "websocket.close", "code": 1012})
            return await refuse(
                send,
                503,
                "ServiceUnavailableError",
                "the gateway is about to end, and takes no new requests",
                headers={"retry-after": "1", "connection": "close"},
            )
        task = asyncio.current_task()
        self._requests.add(task)
        try:
            await self.app(scope, receive, send)
        finally:
            self._requests.discard(task)

    async def run(self, state: Any, serving: Awaitable[Any]) -> None:
        """Run vLLM's ``serve_http`` until a signal, or the engine's death, ends it.

        ``state``: the app's, where `serve_http` puts uvicorn's server.
        """
        task, loop = asyncio.ensure_future(serving), asyncio.get_running_loop()
        await asyncio.sleep(0)  # it installs its signal handlers before it first waits: ours take their place
        self._server = state.server
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.signal, number)
        await (await task)

    def signal(self, number: int) -> None:
        """Begin to end; at once at SIGINT, or the second time."""
        self.interrupted = self.interrupted or self._drain is not None or number == signal.SIGINT
        if self._drain is None:
            self._patience = asyncio.timeout(0 if self.interrupted else self.drain_seconds)
            self._drain = asyncio.create_task(self._end())
        else:
            with suppress(RuntimeError):  # its time is over already
                self._patience.reschedule(asyncio.get_running_loop().time())

    async def _end(self) -> None:
        if self._requests:
            logger.warning("ending: requests under way: %d", len(self._requests))
            with suppress(TimeoutError):
                async with self._patience:
                    await asyncio.wait(set(self._requests))
        if self._requests:
            self.cut_off = len(self._requests)
            for connection in list(self._server.server_state.connections):
                connection.transport.abort()
            await asyncio.wait(set(self._requests), timeout=CUT_OFF_SECONDS)
        self._server.should_exit = True
