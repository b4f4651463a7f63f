"""HTTP client of one server of the teacher: kept connections, bounded waits, bounded bodies."""

import asyncio
import io
from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

import aiohttp
import msgspec

from server.teacher.errors import TeacherError
from server.teacher.patience import Patience
from server.teacher.replies import REFUSALS, quoted

KEEP_ALIVE = 4
"""Idle connections are dropped after this many seconds, before the teacher does it (vLLM: 5 s)."""

LONGEST = 32 * 2**20
"""Bytes of the longest line or body of a reply, not counting an echo of the prompt."""

T = TypeVar("T")


class _ClosedConnection(TeacherError):
    """The server closed a kept connection before it answered: try another connection."""


@dataclass
class _Sending:
    """One request on its way."""

    reused: bool = False
    """Whether its connection had an earlier request."""


def _note_reuse() -> aiohttp.TraceConfig:
    """Notes reused connections, so that one closed while idle is not taken for a server that hangs up."""

    async def reused(_session: aiohttp.ClientSession, context: Any, _: Any) -> None:
        if context.trace_request_ctx is not None:
            context.trace_request_ctx.reused = True

    config = aiohttp.TraceConfig()
    config.on_connection_reuseconn.append(reused)
    return config


class Connection:
    """Sends all requests to one server."""

    def __init__(self, url: str, *, api_key: str | None, connect_timeout: float) -> None:
        """Describe the server; entering the connection opens it.

        Args:
            url: base URL of the server; a user and a password in it are sent as basic authentication.
            api_key: API key that is sent as a bearer token.
            connect_timeout: longest wait for a new connection, in seconds.

        Raises:
            TeacherError: the URL has a password, and there is an API key too.
        """
        parts = urlsplit(url.rstrip("/"))
        self.name = parts.netloc.rpartition("@")[2]
        """Host and port."""
        self.url = urlunsplit(parts._replace(netloc=self.name))
        """Base URL without credentials."""
        self._headers = _credentials(self.name, parts.username, parts.password, api_key)
        self._connect_timeout = connect_timeout
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Connection":
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout),
            trace_configs=[_note_reuse()],
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    @property
    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("the client of the teacher is not open")
        return self._session

    async def status(self, path: str) -> int | None:
        """HTTP status of a GET; None if there is no answer.

        Raises:
            TimeoutError: no connection came in time.
        """
        try:
            async with self._open.get(f"{self.url}{path}") as response:
                return response.status
        except TimeoutError:
            raise
        except (aiohttp.ClientError, OSError, ValueError):
            return None

    async def decoded(
        self, method: str, path: str, type_: type[T], patience: Patience, body: dict[str, Any] | None = None
    ) -> T:
        """The answer to a request, decoded from JSON as ``type_``.

        Raises:
            TeacherError: there is no useful reply.
        """
        async with self.request(method, path, patience, body) as response:
            payload = await self.read(response, patience, LONGEST)
        try:
            return msgspec.json.decode(payload, type=type_)
        except (msgspec.MsgspecError, ValueError) as error:
            raise TeacherError("nonsense", f"{self.name}{path}: {error}") from error

    @asynccontextmanager
    async def request(
        self,
        method: str,
        path: str,
        patience: Patience,
        body: dict[str, Any] | None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response to a request.

        Raises:
            TeacherError: there is no response, or it is an error.
        """
        response = await self._send(method, path, patience, body, headers or {})
        try:
            if response.status not in (200, 204):
                detail = (await self.read(response, patience, LONGEST)).decode(errors="replace")
                message = f"{self.name}{path} answered {response.status}: {quoted(detail)}"
                refused = response.status in REFUSALS
                raise TeacherError("status", message, refused=refused, status=response.status)
            yield response
        finally:
            # After a response that was read to its end, the connection is reused; otherwise it is closed.
            if response.content.at_eof():
                response.release()
            else:
                response.close()

    async def _send(
        self,
        method: str,
        path: str,
        patience: Patience,
        body: dict[str, Any] | None,
        headers: Mapping[str, str],
    ) -> aiohttp.ClientResponse:
        """The response to a request; a kept connection that has died meanwhile is replaced."""
        content = None if body is None else msgspec.json.encode(body)
        typed = {**headers, "Content-Type": "application/json"} if content is not None else headers
        fresh = 0
        while True:
            sending = _Sending()
            request = self._open.request(
                method,
                self.url + path,
                data=None if content is None else io.BytesIO(content),
                headers=typed,
                trace_request_ctx=sending,
            )
            try:
                return await self._wait(request, patience)
            except _ClosedConnection:
                # All kept connections may be closed by now, so each is tried; of new ones, two are tried.
                fresh += not sending.reused
                if fresh > 1:
                    raise

    async def payloads(
        self, response: aiohttp.ClientResponse, patience: Patience, longest: int, *, stream: bool
    ) -> AsyncGenerator[bytes]:
        """The whole body; with ``stream``, the data of each server-sent event."""
        if not stream:
            yield await self.read(response, patience, longest)
            return
        lines = self._lines(response, patience, longest)
        async with aclosing(lines):
            async for line in lines:
                data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
                if data not in (b"", b"[DONE]"):
                    yield data

    async def _lines(
        self, response: aiohttp.ClientResponse, patience: Patience, longest: int
    ) -> AsyncGenerator[bytes]:
        rest = bytearray()
        while chunk := await self._wait(response.content.readany(), patience):
            rest += chunk
            if b"\n" in chunk:
                *lines, rest = rest.split(b"\n")
                for line in lines:
                    yield bytes(line)
            if len(rest) > longest:
                raise TeacherError("nonsense", f"a line of {self.name} has more than {longest} bytes")
        yield bytes(rest)

    async def read(self, response: aiohttp.ClientResponse, patience: Patience, longest: int) -> bytes:
        """The whole body, of at most this many bytes."""
        content = bytearray()
        while chunk := await self._wait(response.content.readany(), patience):
            content += chunk
            if len(content) > longest:
                raise TeacherError("nonsense", f"a reply of {self.name} has more than {longest} bytes")
        return bytes(content)

    async def _wait(self, awaitable: Awaitable[T], patience: Patience) -> T:
        seconds = patience.seconds
        try:
            # Not `wait_for`: on Python 3.11 it loses a cancellation that comes together with the result.
            async with asyncio.timeout(seconds):
                return await awaitable
        except TimeoutError as error:
            message = f"no answer from {self.name} for {max(0.0, seconds):.1f} s"
            raise TeacherError("timeout", message) from error
        except aiohttp.ClientConnectorError as error:
            raise TeacherError("unreachable", f"cannot reach the teacher at {self.name}: {error}") from error
        except aiohttp.ClientConnectionError as error:
            raise _ClosedConnection(
                "unreachable", f"the teacher at {self.name} closed the connection: {error}"
            ) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise TeacherError("unreachable", f"cannot read the teacher at {self.name}: {error}") from error


def _credentials(name: str, user: str | None, password: str | None, api_key: str | None) -> dict[str, str]:
    """The header with the credentials, which are kept nowhere else."""
    if user is None and password is None:
        return {"Authorization": f"Bearer {api_key}"} if api_key else {}
    if api_key:
        message = f"the teacher at {name} has a password in its URL and an API key: leave out one of them"
        raise TeacherError("status", message)
    pair = f"{unquote(user or '')}:{unquote(password or '')}"
    return {"Authorization": f"Basic {b64encode(pair.encode()).decode()}"}
