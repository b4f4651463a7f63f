"""API keys for every route, and the rate-limit headers of a tenant's responses."""

import hmac
from collections.abc import Sequence
from typing import NamedTuple

from router.ledger import Ledger, Status
from router.ledger.base import shown
from server.http.asgi import App, Message, Receive, Send, encoded, route_path
from server.http.errors import ApiError, refuse
from server.http.ratelimit import headers, retry_after
from server.tenants import ADMIN, Tenant, Tenants, hash_key, key_of

METRICS = "/metrics"
ADAPTERS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters")
"""Paths that change the student for everybody: they need an admin's key."""
# Paths that probes and browsers fetch; they cost nothing, and tell nothing about a tenant.
OPEN = {
    "/",
    "/playground/examples",
    "/health",
    "/ready",
    "/ping",
    "/version",
    "/docs",
    "/openapi.json",
}


class Access:
    """ASGI middleware: 401 without a known key; 429 for a used-up limit, if the tenant is configured so.

    The request's state gets the owner of its key as ``tenant``: a `Tenant` or "admin". Without tenants, only
    the metrics may need a key.
    """

    def __init__(
        self, app: App, tenants: Tenants | None, ledger: Ledger, *, metrics_key: str | None = None
    ) -> None:
        """``metrics_key``: a key for the metrics, in addition to an admin's; None for none."""
        self.app = app
        self.tenants = tenants
        self.ledger = ledger
        self._metrics_hash = None if metrics_key is None else hash_key(metrics_key)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Admit the request, or answer 401 or 429."""
        if scope["type"] == "lifespan" or self._is_open(scope):
            return await self.app(scope, receive, send)
        owner = self._owner(scope)
        if owner is None and scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if owner is None:
            error = ApiError(401, "missing or unknown API key")
            return await refuse(scope, send, error, {"www-authenticate": "Bearer"})
        scope.setdefault("state", {})["tenant"] = owner
        if owner == "admin" or not owner.scopes or scope.get("method") != "POST":
            return await self.app(scope, receive, send)
        if owner.exhausted == "refuse":
            shared = [scope for scope in owner.scopes if scope.teacher is None]  # not of one teacher alone
            used_up = _used_up(await self.ledger.status(shared) or ())
            if used_up is not None:
                told = headers([used_up.status]) | retry_after(used_up.status.retry_after_seconds)
                return await refuse(scope, send, ApiError(429, used_up.message), told)
        await self.app(scope, receive, self._telling(owner, send))

    def _is_open(self, scope: Message) -> bool:
        """Whether a request needs no key."""
        if _is_of_metrics(scope):
            return (self.tenants is None and self._metrics_hash is None) or _is_preflight(scope)
        if self.tenants is None or scope.get("method") == "OPTIONS":
            return True
        return route_path(scope) in OPEN and scope.get("method") in ("GET", "HEAD")

    def _owner(self, scope: Message) -> Tenant | ADMIN | None:
        """The owner of the request's key; None if the key is unknown, or not allowed for this path."""
        sent = dict(scope["headers"])
        credential = sent.get(b"authorization") or sent.get(b"x-api-key")
        if credential is None:
            return None
        credential = credential.decode("latin-1")
        owner = None if self.tenants is None else self.tenants.authenticate(credential)
        if route_path(scope).startswith(ADAPTERS):
            return "admin" if owner == "admin" else None
        if not _is_of_metrics(scope):
            return owner
        if self._metrics_hash is not None and hmac.compare_digest(
            self._metrics_hash, hash_key(key_of(credential))
        ):
            return "admin"
        return "admin" if owner == "admin" else None

    def _telling(self, tenant: Tenant, send: Send) -> Send:
        """A `send` that adds the tenant's `x-ratelimit-*` headers to the response."""

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses = await self.ledger.status(tenant.scopes) or ()
                message = {**message, "headers": [*message["headers"], *encoded(headers(statuses))]}
            await send(message)

        return tell


def _is_preflight(scope: Message) -> bool:
    """Whether a browser asks what it may send; vLLM's CORS middleware answers it, and no route."""
    if scope.get("method") != "OPTIONS":
        return False
    names = {name for name, _ in scope["headers"]}
    return names >= {b"origin", b"access-control-request-method"}


def _is_of_metrics(scope: Message) -> bool:
    """Whether the request is for the metrics, which name tenants. Their route takes any longer path too."""
    return route_path(scope).startswith(METRICS)


def owner_of(scope: Message) -> Tenant | ADMIN | None:
    """The owner of a request's key; None if the gateway asks for none."""
    owner: Tenant | ADMIN | None = scope.get("state", {}).get("tenant")
    return owner


class _UsedUp(NamedTuple):
    """A limit with nothing left."""

    status: Status
    message: str


def _used_up(statuses: Sequence[Status]) -> _UsedUp | None:
    """A limit in tokens with nothing left, or in money with less than a hundredth left.

    A fraction has room again with the next completion. Less money than one call costs may be left forever.
    """
    for status in statuses:
        limit = status.scope.limit
        if limit.type == "tokens" and status.remaining == 0:
            message = f"{limit.size} teacher tokens in {limit.window_seconds:g} s are used up"
            return _UsedUp(status, message)
        if limit.type == "cost" and status.remaining * 100 < limit.size:
            message = (
                f"a teacher's cost of {shown(limit, limit.size):g} in {limit.window_seconds:g} s is used up"
            )
            return _UsedUp(status, message)
    return None
