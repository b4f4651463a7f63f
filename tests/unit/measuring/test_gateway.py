"""The client that measures a running gateway: its requests, and replies that it refuses."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from measuring.chats import Turn
from measuring.gateway import GatewayClient, GatewayError, GatewayPrice, GatewayPrices, GatewayReply

MODELS = {"data": [{"id": "wheels"}]}
CHAT = {
    "choices": [{"message": {"content": "ab"}, "token_ids": [5, 6, 7]}],
    "usage": {"prompt_tokens": 4},
    "teacher": {"spans": [[1, 2]], "tokens": 1, "calls": 1, "degraded": False},
}


HTML = httpx.Response(200, text="<html>busy</html>", headers={"content-type": "text/html"})


def client(answer: Callable[[httpx.Request], httpx.Response]) -> GatewayClient:
    made = GatewayClient("http://there/", concurrency=2, max_tokens=9)
    transport = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    made._openai = AsyncOpenAI(
        base_url="http://there/v1", api_key="none", max_retries=0, http_client=transport
    )
    return made


def asked(answer: Callable[[httpx.Request], httpx.Response]) -> list[GatewayReply]:
    async def go() -> list[GatewayReply]:
        async with client(answer) as gateway:
            return await gateway.ask_all(["one", "two"], 0.2)

    return asyncio.run(go())


def answering(chat: Any, models: Any = MODELS) -> Callable[[httpx.Request], httpx.Response]:
    def answer(request: httpx.Request) -> httpx.Response:
        body = models if request.url.path.endswith("/models") else chat
        return body if isinstance(body, httpx.Response) else httpx.Response(200, json=body)

    return answer


def test_a_reply_says_who_wrote_what() -> None:
    bodies = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.content:
            bodies.append(json.loads(request.content))
        return answering(CHAT)(request)

    first, _ = asked(answer)
    assert first == GatewayReply("ab", [5, 6, 7], [(1, 2)], 4, 1, 1, degraded=False)
    assert first.by_teacher == [False, True, False]
    assert {body["messages"][0]["content"] for body in bodies} == {"one", "two"}
    for body in bodies:
        assert (body["model"], body["teacher_budget"], body["max_tokens"]) == ("wheels", 0.2, 9)
        assert (body["temperature"], body["return_token_ids"]) == (0, True)


def test_a_conversation_is_sent_unchanged_and_without_unset_parameters() -> None:
    conversation = (Turn("system", "Be brief."), Turn("user", "Why?"))
    bodies = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.content:
            bodies.append(json.loads(request.content))
        return answering(CHAT)(request)

    async def go() -> None:
        made = client(answer)
        made._optional = GatewayClient("http://there/", concurrency=1, temperature=None)._optional
        async with made as gateway:
            await gateway.ask(conversation, 0.2)

    asyncio.run(go())
    (body,) = bodies
    assert body["messages"] == [turn._asdict() for turn in conversation]
    assert body.keys().isdisjoint({"temperature", "max_tokens"})


def prices(body: Any) -> GatewayPrices:
    def answer(request: httpx.Request) -> httpx.Response:
        models = httpx.Response(200, json=MODELS)
        prices = body if isinstance(body, httpx.Response) else httpx.Response(200, json=body)
        return prices if request.url.path == "/prices" else models

    async def go() -> GatewayPrices:
        async with client(answer) as gateway:
            return await gateway.prices()

    return asyncio.run(go())


def test_prices_are_read_from_the_gateways_own_route() -> None:
    body = {"learned": True, "prices": [{"rate": 0.1, "price": -2.5}], "realised": []}
    assert prices(body) == GatewayPrices(True, [GatewayPrice(0.1, -2.5)])


@pytest.mark.parametrize("body", [httpx.Response(404, text="Not Found"), {"learned": 1}, [], HTML])
def test_a_server_without_prices_is_refused(body: Any) -> None:
    with pytest.raises(GatewayError, match="the gateway at http://there: "):
        prices(body)


def changed(**fields: Any) -> dict[str, Any]:
    return CHAT | fields


@pytest.mark.parametrize(
    ("chat", "problem"),
    [
        (None, "cannot be read"),
        ([], "cannot be read"),
        ({}, "choices"),
        (HTML, "cannot be read"),
        (httpx.Response(200, content=b"\xff\xfe"), "cannot be read"),
        (changed(choices=None), "choices"),
        (changed(choices=[]), "0 choices"),
        (changed(choices=[{"message": {"content": None}, "token_ids": None}]), "token_ids"),
        (changed(choices=[{"message": {"content": None}, "token_ids": []}]), "without a token"),
        (changed(usage=None), "usage"),
        (changed(teacher=None), "no `teacher`"),
        (changed(teacher={"spans": [[0, 9]], "tokens": 9, "calls": 1, "degraded": False}), "do not fit"),
        (changed(teacher={"spans": [[2, 1]], "tokens": 0, "calls": 1, "degraded": False}), "do not fit"),
        (httpx.Response(400, json={"error": {"message": "no such budget"}}), "no such budget"),
    ],
)
def test_an_unusable_answer_is_reported_in_one_line(chat: Any, problem: str) -> None:
    with pytest.raises(GatewayError, match=rf"the gateway at http://there: .*{problem}"):
        asked(answering(chat))


@pytest.mark.parametrize("models", [None, {"data": []}, {"data": None}, HTML, httpx.Response(500)])
def test_a_server_without_a_model_is_refused(models: Any) -> None:
    with pytest.raises(GatewayError, match="the gateway at http://there: "):
        asked(answering(CHAT, models))
