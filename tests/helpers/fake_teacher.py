"""A teacher's HTTP server with the answers that a test gives it."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """A teacher on the loopback that gives one answer, or several in turn and then the last one for ever."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.requests: list[web.Request] = []
        self.bodies: list[dict[str, Any]] = []
        self.connections: set[tuple[str, int]] = set()
        self.lost = asyncio.Event()
        """Set when a client hangs up on `until_lost`."""
        self.models: object = {"data": [{"id": "big", "max_model_len": 512}, {"id": "other"}]}
        self.tokenizer: Any = None
        """Tokenizer for the answers of /tokenize and /detokenize."""
        self.generates = 404
        """Status of /inference/v1/generate for an empty request: 400 on a server that has this path."""
        self.missing = "1 validation error: {'type': 'missing', 'loc': 'body.token_ids'}"
        """Message of that refusal."""
        self.health = 200
        self.health_seconds = 0.0
        self.url = ""

    async def __aenter__(self) -> "Server":
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/inference/v1/generate", self._generate)
        app.router.add_get("/v1/models", self._list)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/detokenize", self._detokenize)
        app.router.add_get("/health", self._health)
        self._server = TestServer(app)
        await self._server.start_server()
        self.url = str(self._server.make_url("/"))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.close()

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        self.bodies.append(await request.json())
        self.connections.add(request.transport.get_extra_info("peername"))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return await answer(request)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if self.generates == 400 and await request.json():
            return await self._complete(request)
        return web.json_response({"error": {"message": self.missing}}, status=self.generates)

    async def _list(self, _: web.Request) -> web.Response:
        return web.json_response(self.models)

    async def _tokenize(self, request: web.Request) -> web.Response:
        asked = await request.json()
        ids = self.tokenizer.encode(asked["prompt"], add_special_tokens=asked["add_special_tokens"])
        return web.json_response({"count": len(ids), "tokens": ids})

    async def _detokenize(self, request: web.Request) -> web.Response:
        asked = await request.json()
        return web.json_response({"prompt": self.tokenizer.decode(asked["tokens"])})

    async def _health(self, _: web.Request) -> web.Response:
        await asyncio.sleep(self.health_seconds)
        return web.Response(status=self.health)

    async def until_lost(self) -> None:
        """Hangs; the test server cancels a handler whose client has hung up."""
        try:
            await asyncio.Event().wait()
        finally:
            self.lost.set()


def choice(ids: list[int] | None, finish: str | None = "length", **more: object) -> dict[str, Any]:
    """One reply of vLLM's /v1/completions, with the fields that we do not read."""
    entry = {"index": 0, "text": "…", "token_ids": ids, "finish_reason": finish, "stop_reason": None, **more}
    return {"id": "cmpl-1", "object": "text_completion", "choices": [entry], "usage": None}


def body(reply: object, status: int = 200) -> Answer:
    async def answer(_: web.Request) -> web.Response:
        text = reply if isinstance(reply, str) else json.dumps(reply)
        return web.Response(text=text, status=status, content_type="application/json")

    return answer


async def begin_events(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    return response


def event(reply: object) -> bytes:
    return b"data: " + (reply if isinstance(reply, str) else json.dumps(reply)).encode() + b"\n\n"


def stream(*replies: object, done: bool = True, pause: float = 0.0) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = await begin_events(request)
        for reply in replies:
            await response.write(event(reply))
            await asyncio.sleep(pause)
        if done:
            await response.write(event("[DONE]"))
        return response

    return answer
