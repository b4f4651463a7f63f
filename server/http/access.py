"""Who may use the gateway: a key in front of every route; what a tenant's responses say of its limits."""

from collections.abc import Sequence
from typing import Any

from router.ledger import Ledger, Status
from server.http.asgi import Message, Receive, Send, encoded, refuse
from server.http.ratelimit import headers, retry_after
from server.tenants import ADMIN, Tenant, Tenants

# What probes, scrapers and browsers fetch; nothing of it costs or tells anything of a tenant.
OPEN = {
    "/",
    "/playground/examples",
    "/health",
    "/ready",
    "/ping",
    "/version",
    "/metrics",
    "/docs",
    "/openapi.json",
}


class Access:
    """ASGI middleware: 401 without a known key, 429 where a tenant wants that once its limit is used up.

    Whose key it was stands in the request's state as ``tenant``: a `Tenant` or "admin".
    """

    def __init__(self, app: Any, tenants: Tenants, ledger: Ledger) -> None:
        self.app = app
        self.tenants = tenants
        self.ledger = ledger

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["path"] in OPEN and scope.get("method") in ("GET", "HEAD")):
            return await self.app(scope, receive, send)
        sent = dict(scope["headers"])
        credential = sent.get(b"authorization") or sent.get(b"x-api-key")
        owner = self.tenants.authenticate(None if credential is None else credential.decode("latin-1"))
        if owner is None and scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if owner is None:
            return await refuse(
                send,
                401,
                "AuthenticationError",
                "no API key, or not one that this gateway knows",
                headers={"www-authenticate": "Bearer"},
            )
        scope.setdefault("state", {})["tenant"] = owner
        if owner == "admin" or not owner.scopes or scope.get("method") != "POST":
            return await self.app(scope, receive, send)
        if owner.exhausted == "refuse" and (status := _used_up(await self.ledger.status(owner.scopes) or ())):
            return await refuse(
                send,
                429,
                "RateLimitError",
                f"{status.scope.limit.tokens} teacher tokens in {status.scope.limit.window_seconds:g} s are "
                "used up",
                headers=headers([status]) | retry_after(status.retry_after_seconds),
            )
        await self.app(scope, receive, self._telling(owner, send))

    def _telling(self, tenant: Tenant, send: Send) -> Send:
        """Adds the tenant's `x-ratelimit-*` headers to the response."""

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses = await self.ledger.status(tenant.scopes) or ()
                message = {**message, "headers": [*message["headers"], *encoded(headers(statuses))]}
            await send(message)

        return tell


def owner_of(scope: Message) -> Tenant | ADMIN | None:
    """Whose key a request came with; None where the gateway asks for none."""
    return scope.get("state", {}).get("tenant")


def _used_up(statuses: Sequence[Status]) -> Status | None:
    """A limit in tokens with nothing left. (A fraction has room again with the next completion.)"""
    return next((s for s in statuses if s.scope.limit.type == "tokens" and s.remaining == 0), None)
