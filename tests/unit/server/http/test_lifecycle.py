"""The gateway's end, with a stand-in that has uvicorn's attributes and with vLLM's own server."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from server.http import lifecycle as module
from server.http.lifecycle import Lifecycle
from server.vllm_api import HttpLayer

pytestmark = pytest.mark.steady_time


async def until(true: Callable[[], bool]) -> None:
    for _ in range(200):
        if true():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it never came true")


@pytest.fixture(autouse=True)
def short_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HAND_OVER_SECONDS", 0.2)


class Connection:
    """A connection. If it is closed, its request sees a client that leaves."""

    def __init__(self) -> None:
        self.transport = self
        self.left = asyncio.Event()

    def abort(self) -> None:
        self.left.set()


class Gateway:
    """A lifecycle around an app whose answers end when a test ends them, or when their client leaves."""

    def __init__(self, drain_seconds: float) -> None:
        self.lifecycle = Lifecycle(self.app, drain_seconds=drain_seconds)
        self.connections: list[Connection] = []
        self.finish = asyncio.Event()
        self.server = SimpleNamespace(
            should_exit=False, server_state=SimpleNamespace(connections=self.connections)
        )
        self.state = SimpleNamespace()
        client = httpx.AsyncClient(transport=httpx.ASGITransport(self.lifecycle), base_url="http://gateway")
        self.get, self.post = client.get, client.post

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/slow":
            self.connections.append(connection := Connection())
            ends = [asyncio.create_task(event.wait()) for event in (self.finish, connection.left)]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"whole" if self.finish.is_set() else b"cut"})

    async def serve(self) -> Any:
        """Serve as vLLM does: install its handlers, then run uvicorn until it shall exit."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, pytest.fail, "vLLM's handler")
        self.state.server = self.server
        await until(lambda: self.server.should_exit)
        return asyncio.sleep(0)

    async def begin(self, requests: int) -> tuple[asyncio.Task[Any], list[asyncio.Task[Any]]]:
        running = asyncio.create_task(self.lifecycle.run(self.state, self.serve()))
        slow = [asyncio.create_task(self.post("/slow")) for _ in range(requests)]
        await until(lambda: len(self.connections) == requests and self.lifecycle._server is not None)
        return running, slow


async def test_at_sigterm_running_requests_end_normally_and_new_ones_are_refused():
    gateway = Gateway(drain_seconds=10)
    running, slow = await gateway.begin(3)
    assert (await gateway.get("/ready")).status_code == 200
    signal.raise_signal(signal.SIGTERM)
    await until(lambda: gateway.lifecycle._drain is not None)
    assert (await gateway.get("/ready")).status_code == 503
    handed_over = await gateway.post("/v1/completions")
    assert (handed_over.status_code, handed_over.headers["connection"]) == (200, "close")
    await asyncio.sleep(0.3)
    refused = await gateway.post("/v1/completions")
    assert refused.status_code == 503
    assert refused.json()["error"]["type"] == "ServiceUnavailableError"
    assert refused.headers["retry-after"] == "1"
    assert refused.headers["connection"] == "close"
    anthropics = (await gateway.post("/v1/messages")).json()
    assert (anthropics["type"], anthropics["error"]["type"]) == ("error", "overloaded_error")
    assert (await gateway.get("/ready")).status_code == 503
    under_root = httpx.ASGITransport(gateway.lifecycle, root_path="/api")
    async with httpx.AsyncClient(transport=under_root, base_url="http://gateway") as client:
        assert (await client.get("/api/ready")).status_code == 503
    assert (await gateway.get("/health")).status_code == 200
    assert (await gateway.get("/metrics")).status_code == 200
    assert not gateway.server.should_exit
    gateway.finish.set()
    assert [(await reply).text for reply in slow] == ["whole"] * 3
    await asyncio.wait_for(running, 1)
    assert (gateway.lifecycle.cut_off, gateway.lifecycle.interrupted) == (0, False)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_cuts_off_running_requests(second: signal.Signals):
    gateway = Gateway(drain_seconds=10)
    running, slow = await gateway.begin(2)
    signal.raise_signal(signal.SIGTERM)
    await until(lambda: gateway.lifecycle._drain is not None)
    await asyncio.sleep(0.01)
    signal.raise_signal(second)
    await asyncio.wait_for(running, 1)
    assert [(await reply).text for reply in slow] == ["cut"] * 2
    assert (gateway.lifecycle.cut_off, gateway.lifecycle.interrupted) == (2, True)


async def test_the_deadline_cuts_off_running_requests():
    gateway = Gateway(drain_seconds=0.05)
    running, slow = await gateway.begin(1)
    signal.raise_signal(signal.SIGTERM)
    await asyncio.wait_for(running, 1)
    assert (await slow[0]).text == "cut"
    assert (gateway.lifecycle.cut_off, gateway.lifecycle.interrupted) == (1, False)


async def test_sigint_ends_the_gateway_at_once():
    gateway = Gateway(drain_seconds=10)
    running, _ = await gateway.begin(1)
    signal.raise_signal(signal.SIGINT)
    await asyncio.wait_for(running, 1)
    assert (gateway.lifecycle.cut_off, gateway.lifecycle.interrupted) == (1, True)


async def test_without_requests_the_gateway_ends_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "HAND_OVER_SECONDS", 10)
    gateway = Gateway(drain_seconds=30)
    running, _ = await gateway.begin(0)
    signal.raise_signal(signal.SIGTERM)
    await asyncio.wait_for(running, 1)
    assert gateway.lifecycle.cut_off == 0


async def test_the_hand_over_takes_no_more_than_half_the_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "HAND_OVER_SECONDS", 10)
    gateway = Gateway(drain_seconds=1)
    running, slow = await gateway.begin(1)
    signal.raise_signal(signal.SIGTERM)
    await asyncio.sleep(0.6)
    assert (await gateway.post("/v1/completions")).status_code == 503
    gateway.finish.set()
    await asyncio.wait_for(running, 1)
    assert (await slow[0]).text == "whole"


async def test_a_probe_under_way_at_the_end_is_not_cut_off():
    gateway = Gateway(drain_seconds=10)
    running, _ = await gateway.begin(1)
    signal.raise_signal(signal.SIGTERM)
    await asyncio.sleep(0.3)
    probe = asyncio.create_task(gateway.get("/slow"))
    await until(lambda: len(gateway.connections) == 2)
    gateway.finish.set()
    await asyncio.wait_for(running, 1)
    assert (await probe).text == "whole"
    assert gateway.lifecycle.cut_off == 0


async def test_a_websocket_is_refused_while_draining():
    gateway = Gateway(drain_seconds=10)
    running, _ = await gateway.begin(1)
    signal.raise_signal(signal.SIGTERM)
    await until(lambda: gateway.lifecycle._drain is not None)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await gateway.lifecycle({"type": "websocket", "path": "/v1/realtime"}, None, send)
    assert sent == [{"type": "websocket.close", "code": 1012}]
    gateway.finish.set()
    await running


@pytest.mark.parametrize(("drain_seconds", "cut_off"), [(10, 0), (0.05, 1)])
async def test_vllms_own_server_ends_its_requests_at_sigterm(drain_seconds: float, cut_off: int):
    finish, ended = asyncio.Event(), asyncio.Event()

    async def stream(request: Request) -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            try:
                yield "begun "
                await finish.wait()
                yield "whole"
            finally:
                ended.set()

        return StreamingResponse(pieces())

    app = Starlette(routes=[Route("/stream", stream, methods=["POST"])])
    app.state.engine_client = None
    app.middleware_stack = lifecycle = Lifecycle(app.build_middleware_stack(), drain_seconds=drain_seconds)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        options = {"host": "127.0.0.1", "port": port, "log_level": "error", "timeout_graceful_shutdown": 5}
        serving = HttpLayer().serve_http(app, sock=listener, **options)
        running = asyncio.create_task(lifecycle.run(app.state, serving))
        await until(lambda: lifecycle._server is not None and lifecycle._server.started)
        async with (
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
            client.stream("POST", "/stream") as reply,
        ):
            text = reply.aiter_text()
            assert await anext(text) == "begun "
            signal.raise_signal(signal.SIGTERM)
            await until(lambda: lifecycle._drain is not None)
            if cut_off:
                with pytest.raises(httpx.TransportError):
                    await anext(text)
            else:
                async with client.stream("POST", "/stream") as handed_over:
                    assert (handed_over.status_code, handed_over.headers["connection"]) == (200, "close")
                await until(lambda: lifecycle._refuses)
                refused = await client.post("/stream")
                assert (refused.status_code, refused.headers["connection"]) == (503, "close")
                finish.set()
                assert await anext(text) == "whole"
        await asyncio.wait_for(running, 10)
    assert ended.is_set()
    assert lifecycle.cut_off == cut_off
