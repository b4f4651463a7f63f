"""Tenants and shared limits on a real gateway, with its ledger in a real Redis."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from openai import AsyncOpenAI

from measuring.pair import Serving
from server.tenants import hash_key
from tests.helpers.client import PATIENCE, chat, settled
from tests.helpers.gateways import StartGateway
from tests.helpers.redis_server import RedisServer

LIMIT = 60
ACME = {
    "name": "acme",
    "keys": [hash_key("acme-key")],
    "maximum_budget": 0.5,
    "limits": [{"type": "tokens", "tokens": LIMIT, "window_seconds": 3600}],
}
STRICT = {
    "name": "strict",
    "keys": [hash_key("strict-key")],
    "maximum_budget": {"fraction": 0.2},
    "over_maximum": "refuse",
    "exhausted": "refuse",
    "limits": [{"type": "tokens", "tokens": 1, "window_seconds": 3600}],
}


@dataclass
class Stack:
    serving: Serving
    redis: RedisServer
    tenants: Path

    def write(self, *tenants: dict[str, Any]) -> None:
        self.tenants.write_text(yaml.safe_dump({"admin_keys": [hash_key("root")], "tenants": list(tenants)}))

    def client(self, key: str) -> AsyncOpenAI:
        url = f"{self.serving.gateway}/v1"
        return AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=PATIENCE)

    async def get(self, path: str, key: str | None = None) -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(timeout=PATIENCE) as http:
            return await http.get(f"{self.serving.gateway}{path}", headers=headers)

    async def budgets(self, key: str) -> dict[str, Any]:
        """The gateway's budgets once Redis has answered: after a load it may be late for a while."""
        for _ in range(300):
            view = (await self.get("/budgets", key)).json()
            if view["available"]:
                return view
            await asyncio.sleep(0.2)
        pytest.fail("Redis does not answer the gateway")

    async def budget(self, key: str) -> dict[str, Any]:
        """A tenant's only budget."""
        (budget,) = (await self.budgets(key))["budgets"]
        return budget


@pytest.fixture(scope="module")
def limited(gateway: StartGateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    directory = tmp_path_factory.mktemp("limited")
    redis = RedisServer(directory)
    tenants = directory / "tenants.yaml"
    ledger = {"type": "redis", "url": redis.url, "lease_seconds": 5}
    limits = [{"type": "fraction", "fraction": 0.3, "window_seconds": 3600, "slack_tokens": 64}]
    flags = ("--tenants", str(tenants), "--ledger", json.dumps(ledger), "--limits", json.dumps(limits))
    stack = Stack(None, redis, tenants)
    stack.write(ACME, STRICT)
    try:
        with gateway(directory, *flags) as stack.serving:
            yield stack
    finally:
        redis.stop()


@pytest.fixture
async def acme(limited: Stack) -> AsyncIterator[AsyncOpenAI]:
    async with limited.client("acme-key") as client:
        yield client


async def test_only_known_keys_are_accepted(limited: Stack, sources: list[str]) -> None:
    async with limited.client("wrong") as client:
        with pytest.raises(openai.AuthenticationError, match="missing or unknown API key"):
            await chat(client, sources[0])
    assert (await limited.get("/v1/models")).status_code == 401
    assert (await limited.get("/v1/models", "acme-key")).status_code == 200
    assert (await limited.get("/ready")).status_code == 200
    for key, status in {None: 401, "acme-key": 401, "root": 200}.items():
        assert (await limited.get("/metrics", key)).status_code == status


async def test_a_budget_above_the_maximum_is_clamped_and_reported(
    acme: AsyncOpenAI, sources: list[str]
) -> None:
    reply = await chat(acme, sources[0], 0.9)
    assert reply.teacher["clamped"] is True
    assert (await chat(acme, sources[0], 0.5)).teacher["clamped"] is False
    raw = await acme.chat.completions.with_raw_response.create(
        model="wheels", messages=[{"role": "user", "content": sources[0]}]
    )
    assert raw.headers["x-ratelimit-limit-teacher-tokens"] == str(LIMIT)
    assert 0 < int(raw.headers["x-ratelimit-remaining-teacher-tokens"]) <= LIMIT


async def test_a_budget_above_the_maximum_can_be_refused(limited: Stack, sources: list[str]) -> None:
    async with limited.client("strict-key") as client:
        with pytest.raises(openai.BadRequestError) as error:
            await chat(client, sources[0], 0.9)
        assert error.value.body["param"] == "teacher_budget"
        assert "maximum of 0.2" in error.value.body["message"]


async def test_a_limit_holds_under_concurrent_requests(
    limited: Stack, acme: AsyncOpenAI, sources: list[str]
) -> None:
    for _ in range(300):  # until the reservations of earlier tests are settled
        budget = await limited.budget("acme-key")
        if not budget["reserved"]:
            break
        await asyncio.sleep(0.2)
    before = budget["spent"]
    replies = await asyncio.gather(*(chat(acme, source, 0.5) for source in sources[:150] * 2))
    assert all(reply.choices[0].finish_reason in ("stop", "length") for reply in replies)
    written = sum(reply.teacher["tokens"] for reply in replies)
    assert written > 0
    for _ in range(300):  # a settlement that timed out at Redis comes later
        budget = await limited.budget("acme-key")
        if budget["spent"] - before == written and not budget["reserved"]:
            break
        await asyncio.sleep(0.2)
    assert budget["spent"] - before == written
    assert budget["spent"] <= LIMIT
    assert budget["reserved"] == 0
    view = await limited.budgets("acme-key")
    assert [tenant["name"] for tenant in view["tenants"]] == ["acme"]
    everything = await limited.budgets("root")
    assert [(b["scope"], b["tenant"]) for b in everything["budgets"]] == [
        ("global", None),
        ("tenant", "acme"),
        ("tenant", "strict"),
    ]
    everybody = everything["budgets"][0]
    assert everybody["spent"] >= budget["spent"]
    assert everybody["student_tokens"] > 0
    assert await settled(limited.serving.gateway, "wheels_ledger_available", 1, key="root") == 1


async def test_a_used_up_limit_is_reported(limited: Stack, sources: list[str]) -> None:
    """While the only token is reserved, a refusal names the end of its lease; later, that of the window."""
    async with limited.client("strict-key") as client:
        deadline = time.monotonic() + 120
        while not (await limited.budget("strict-key"))["spent"]:
            assert time.monotonic() < deadline, "no request has used the token"
            chats = (chat(client, source, 0.2) for source in sources[:20])
            for reply in await asyncio.gather(*chats, return_exceptions=True):
                assert not isinstance(reply, BaseException) or isinstance(reply, openai.RateLimitError)
        with pytest.raises(openai.RateLimitError) as error:
            await chat(client, sources[0], 0.2)
        assert int(error.value.response.headers["retry-after"]) > 3000


async def test_a_new_key_works_without_a_restart(limited: Stack, sources: list[str]) -> None:
    limited.write(ACME | {"keys": [hash_key("new-key")], "limits": []}, STRICT)
    async with limited.client("new-key") as new, limited.client("acme-key") as old:
        for _ in range(300):
            if (await limited.get("/v1/models", "new-key")).status_code == 200:
                break
            await asyncio.sleep(0.2)
        assert (await chat(new, sources[0], 0.5)).choices[0].finish_reason == "stop"
        with pytest.raises(openai.AuthenticationError):
            await chat(old, sources[0])


async def test_redis_goes_away_and_comes_back(limited: Stack, sources: list[str]) -> None:
    """By default, reservations are refused then: the student goes on alone, nothing waits, nothing fails."""
    limited.write(ACME | {"keys": [hash_key("new-key")], "limits": []}, STRICT)
    async with limited.client("new-key") as client:
        requests = [asyncio.create_task(chat(client, source, 0.5)) for source in sources[:100]]
        await asyncio.wait(requests, return_when=asyncio.FIRST_COMPLETED)
        limited.redis.stop()
        replies = await asyncio.wait_for(asyncio.gather(*requests), PATIENCE)
        assert all(reply.choices[0].finish_reason in ("stop", "length") for reply in replies)
        later = await asyncio.gather(*(chat(client, source, 0.5) for source in sources[:20]))
        assert sum(reply.teacher["tokens"] for reply in later) == 0
        assert any("unavailable" in reply.teacher["denied"] for reply in later)
        assert (await limited.get("/budgets", "root")).json()["available"] is False
        limited.redis.start()
        for _ in range(300):
            replies = await asyncio.gather(*(chat(client, source, 0.5) for source in sources[:20]))
            if any(reply.teacher["tokens"] for reply in replies):
                break
            await asyncio.sleep(0.2)
        else:
            pytest.fail("no teacher after Redis had come back")
