"""Keys for every route, the headers of a limited tenant, and a tenant that has used up its limit."""

import json
from typing import Any

import httpx
import pytest

from router.controller import PriceController
from router.ledger import Charge, FractionOfTraffic, MemoryLedger
from router.policy import Calibration
from server.http.access import OPEN, Access, owner_of
from server.http.budgets import answer
from server.shared_budgets import SharedBudgets
from server.tenants import Tenants, hash_key

LIMITED = {
    "name": "limited",
    "keys": [hash_key("limited")],
    "limits": [{"type": "tokens", "tokens": 100, "window_seconds": 60}],
}
STRICT = LIMITED | {"name": "strict", "keys": [hash_key("strict")], "exhausted": "refuse"}
FREE = {"name": "free", "keys": [hash_key("free")]}


async def app(scope: Any, receive: Any, send: Any) -> None:
    """An app that answers with the tenant of the key."""
    owner = owner_of(scope)
    body = str(getattr(owner, "name", owner)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def tenants() -> Tenants:
    return Tenants(json.dumps({"tenants": [LIMITED, STRICT, FREE], "admin_keys": [hash_key("root")]}))


@pytest.fixture
def access(tenants: Tenants) -> Access:
    return Access(app, tenants, MemoryLedger())


async def ask(
    access: Access,
    key: str | None,
    method: str = "POST",
    path: str = "/v1/chat/completions",
    *,
    root_path: str = "",
    **headers: str,
) -> httpx.Response:
    headers |= {} if key is None else {"Authorization": f"Bearer {key}"}
    transport = httpx.ASGITransport(access, root_path=root_path)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        return await client.request(method, path, headers=headers)


async def spend(access: Access, name: str, tokens: int) -> None:
    (tenant,) = (t for t in access.tenants.current.tenants if t.name == name)
    lease = await access.ledger.reserve(tenant.scopes, tokens)
    await access.ledger.settle(lease, tokens)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/budgets", "/tokenize", "/anything"])
@pytest.mark.parametrize("key", [None, "wrong", hash_key("free")])
async def test_every_route_needs_a_key(access: Access, path: str, key: str | None) -> None:
    response = await ask(access, key, path=path)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("AuthenticationError", None, 401)


@pytest.mark.parametrize(("key", "owner"), [("free", "free"), ("root", "admin")])
async def test_a_key_gives_the_request_its_tenant(access: Access, key: str, owner: str) -> None:
    response = await ask(access, key)
    assert (response.status_code, response.text) == (200, owner)


async def test_the_key_header_of_anthropic_clients_is_accepted(access: Access) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(access), base_url="http://gateway") as client:
        response = await client.post("/v1/messages", headers={"x-api-key": "free"})
    assert response.text == "free"


@pytest.mark.parametrize("path", sorted(OPEN))
async def test_probes_need_no_key(access: Access, path: str) -> None:
    assert (await ask(access, None, "GET", path)).status_code == 200
    assert (await ask(access, None, "POST", path)).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/api/health"])
async def test_probes_need_no_key_under_a_root_path(access: Access, path: str) -> None:
    assert (await ask(access, None, "GET", path, root_path="/api")).status_code == 200
    assert (await ask(access, None, "GET", "/api/v1/models", root_path="/api")).status_code == 401
    assert (await ask(access, None, "GET", "/api/health")).status_code == 401


async def test_a_preflight_needs_no_key(access: Access) -> None:
    """A browser sends a preflight without a key; the middleware for CORS answers it."""
    asked = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    for path in ("/v1/chat/completions", "/metrics"):
        assert (await ask(access, None, "OPTIONS", path, **asked)).status_code == 200
        assert (await ask(access, None, "POST", path, **asked)).status_code == 401
    assert (await ask(access, None, "OPTIONS")).status_code == 200
    assert (await ask(access, None, "OPTIONS", "/metrics")).status_code == 401  # it answers any method


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters/tuned"])
async def test_only_an_admin_changes_the_students_adapters(access: Access, path: str) -> None:
    assert [(await ask(access, key, path=path)).status_code for key in (None, "free", "root")] == [
        401,
        401,
        200,
    ]


METRICS = ("/metrics", "/metrics/", "/metricsx", "/api/metrics")  # vLLM's route takes all of them


@pytest.mark.parametrize("path", METRICS)
@pytest.mark.parametrize("metrics_key", [None, "scrape"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
async def test_metrics_name_tenants(
    tenants: Tenants, path: str, metrics_key: str | None, method: str
) -> None:
    access = Access(app, tenants, MemoryLedger(), metrics_key=metrics_key)
    for key, status in {None: 401, "free": 401, "root": 200, "scrape": 200 if metrics_key else 401}.items():
        assert (await ask(access, key, method, path, root_path="/api")).status_code == status
    assert (await ask(access, "scrape", "GET", "/v1/models")).status_code == 401


@pytest.mark.parametrize("path", METRICS)
async def test_without_tenants_metrics_are_open_unless_they_have_a_key(path: str) -> None:
    open_to_all = Access(app, None, MemoryLedger())
    assert (await ask(open_to_all, None, "GET", path, root_path="/api")).status_code == 200
    closed = Access(app, None, MemoryLedger(), metrics_key="scrape")
    for key, status in {None: 401, "wrong": 401, "scrape": 200}.items():
        assert (await ask(closed, key, "GET", path, root_path="/api")).status_code == status
    assert (await ask(closed, None)).text == "None"


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
async def test_anthropics_clients_are_refused_in_their_shape(access: Access, path: str) -> None:
    refused = (await ask(access, "wrong", path=path)).json()
    assert (refused["type"], refused["error"]["type"]) == ("error", "authentication_error")
    await spend(access, "strict", 100)
    used_up = (await ask(access, "strict", path=path)).json()
    assert (used_up["type"], used_up["error"]["type"]) == ("error", "rate_limit_error")


async def test_a_websocket_needs_a_key(access: Access) -> None:
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    await access({"type": "websocket", "path": "/v1/realtime", "headers": []}, None, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_responses_tell_what_is_left_of_a_limit(access: Access) -> None:
    await spend(access, "limited", 30)
    response = await ask(access, "limited")
    assert response.headers["x-ratelimit-limit-teacher-tokens"] == "100"
    assert response.headers["x-ratelimit-remaining-teacher-tokens"] == "70"
    assert response.headers["content-type"] == "text/plain"
    assert "x-ratelimit-limit-teacher-tokens" not in (await ask(access, "free")).headers


async def test_a_used_up_limit_is_refused_or_leaves_the_student_alone(access: Access) -> None:
    """One tenant goes on with the student alone, and the other one gets a refusal."""
    await spend(access, "limited", 100)
    await spend(access, "strict", 100)
    assert (await ask(access, "limited")).headers["x-ratelimit-remaining-teacher-tokens"] == "0"
    response = await ask(access, "strict")
    assert response.status_code == 429
    assert 59 <= int(response.headers["retry-after"]) <= 62
    assert response.headers["x-ratelimit-remaining-teacher-tokens"] == "0"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("RateLimitError", 429)
    assert error["message"] == "100 teacher tokens in 60 s are used up"
    assert (await ask(access, "strict", "GET", "/v1/models")).status_code == 200


async def test_tenants_see_their_own_budgets_and_admins_see_all(tenants: Tenants) -> None:
    limit = FractionOfTraffic(fraction=0.2, window_seconds=60)
    prices = PriceController(Calibration(((0.5, 1.0),)), span_tokens=4)
    shared = SharedBudgets(MemoryLedger(), prices, [limit])
    tenant = tenants.current.tenants[0]

    async def seen(owner: Any, tenants: Tenants | None = tenants) -> list[str | None]:
        view = await answer(shared, tenants, owner)
        return [budget["tenant"] for budget in view["budgets"]]

    assert await seen(tenant) == ["limited"]
    assert await seen("admin") == [None, "limited", "strict"]
    assert await seen(None, None) == [None]


async def test_a_limit_in_money_is_shown_and_counts_as_used_up_with_a_hundredth_left() -> None:
    """0.0099 of 0.01 are spent. With less than 0.0001 left it counts as used up: no call may ever fit."""
    limit = {"type": "cost", "cost": 0.01, "window_seconds": 60}
    source = json.dumps({"tenants": [STRICT | {"limits": [limit]}]})
    access = Access(app, Tenants(source, priced=True), MemoryLedger())
    (tenant,) = access.tenants.current.tenants
    lease = await access.ledger.reserve(tenant.scopes, 1, charge=Charge(9_900_000))
    await access.ledger.settle(lease, 1, 9_900_000)
    response = await ask(access, "strict")
    assert response.status_code == 200
    assert response.headers["x-ratelimit-limit-teacher-cost"] == "0.01"
    assert response.headers["x-ratelimit-remaining-teacher-cost"] == "0.0001"
    assert "x-ratelimit-limit-teacher-tokens" not in response.headers
    await access.ledger.settle(await access.ledger.reserve(tenant.scopes, 1), 1, 1)
    response = await ask(access, "strict")
    assert response.status_code == 429
    assert response.json()["error"]["message"] == "a teacher's cost of 0.01 in 60 s is used up"


async def test_a_limit_of_one_teacher_refuses_nobody() -> None:
    """Another teacher may still have room."""
    limits = [LIMITED["limits"][0] | {"teacher": "big"}]
    content = json.dumps({"tenants": [STRICT | {"limits": limits}]})
    access = Access(app, Tenants(content, teachers=["small", "big"]), MemoryLedger())
    await spend(access, "strict", 100)
    response = await ask(access, "strict")
    assert (response.status_code, response.headers["x-ratelimit-remaining-teacher-tokens"]) == (200, "0")
