"""X-Request-Id from the client to the response, to the app and into the log."""

import asyncio
import io
import logging
from typing import Any

import httpx
import pytest

from server.http.request_id import REQUEST_ID, RequestIds, log_with_ids

logger = logging.getLogger("server.tests")


async def app(scope: Any, receive: Any, send: Any) -> None:
    """An app that answers with the id in its headers and context, and logs a line in another task too."""

    async def say() -> None:
        logger.warning("at work")

    await asyncio.create_task(say())
    seen = [value for name, value in scope["headers"] if name == b"x-request-id"]
    body = b" ".join([*seen, REQUEST_ID.get().encode()])
    # With --enable-request-id-headers, vLLM sets an id of its own.
    await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Request-Id", b"vllm")]})
    await send({"type": "http.response.body", "body": body})


async def ask(**headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(RequestIds(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        return await client.post("/v1/completions", headers=headers)


async def test_the_clients_id_is_honoured_and_returned():
    reply = await ask(**{"X-Request-Id": "order-7/b"})
    assert reply.text == "order-7/b order-7/b"
    assert reply.headers.get_list("x-request-id") == ["order-7/b"]


async def test_without_an_id_a_new_one_is_made():
    first, second = await ask(), await ask()
    made = first.headers["x-request-id"]
    assert first.text == f"{made} {made}"
    assert len(made) == 32
    assert made != second.headers["x-request-id"]


@pytest.mark.parametrize("bad", ["", "two words", "x" * 129, "naïve", "tab\there"])
async def test_an_impossible_id_is_refused(bad: str):
    reply = await ask(**{"X-Request-Id": bad.encode("latin-1")})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "X-Request-Id"


async def test_log_lines_have_the_id():
    stream = io.StringIO()
    log_with_ids(stream)
    logging.getLogger().setLevel(logging.ERROR)  # as a library of vLLM does; our loggers are not the root
    await asyncio.create_task(ask(**{"X-Request-Id": "order-7"}))  # a context of its own
    logger.warning("at rest")
    during, after = stream.getvalue().splitlines()
    assert during.endswith("[server.tests] order-7: at work")
    assert after.endswith("[server.tests] at rest")
