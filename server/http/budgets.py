"""The response of `GET /budgets`: every limit, its spending, and the resulting price."""

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

from typing_extensions import TypedDict

from router.controller import PriceController
from router.ledger import Limit, Status
from router.ledger.base import shown
from server.shared_budgets import SharedBudgets
from server.tenants import ADMIN, Tenant, Tenants


class BudgetView(TypedDict):
    """One limit, with teacher tokens spent, reserved and remaining; amounts of money if it is in money."""

    scope: Literal["tenant", "global"]
    tenant: str | None
    limit: Limit
    spent: float
    reserved: float
    remaining: float
    student_tokens: int
    """Student tokens in the window; all completion tokens if the limit is in money."""
    rate: float | None
    """Realised teacher rate in the window; None if the limit is in money."""
    reset_seconds: float
    aim: float | None
    """The teacher rate that the price aims at."""
    price: float | None


class BudgetsView(TypedDict):
    """The body of the response."""

    available: bool
    """Whether the ledger's store answers; if not, there are no budgets to show."""
    budgets: list[BudgetView]
    tenants: list[dict[str, Any]]
    """Settings of the tenants, without keys and limits."""


async def answer(shared: SharedBudgets, tenants: Tenants | None, owner: Tenant | ADMIN | None) -> BudgetsView:
    """The budgets that the owner of a key may see: a tenant its own, an admin all; without keys, all."""
    if isinstance(owner, Tenant):
        seen = [owner]
        scopes = list(owner.scopes)
    else:
        seen = list(tenants.current.tenants) if tenants else []
        scopes = list(shared.everybody)
        for tenant in seen:
            scopes += tenant.scopes
    return view(await shared.ledger.status(scopes), seen, shared.prices)


def view(
    statuses: Sequence[Status] | None, tenants: Sequence[Tenant], prices: PriceController | None
) -> BudgetsView:
    """The body of the response, ready for JSON; ``statuses`` is None if the ledger's store is unreachable."""
    return {
        "available": statuses is not None,
        "budgets": [_budget(status, prices) for status in statuses or ()],
        "tenants": [_tenant(tenant) for tenant in tenants],
    }


def _budget(status: Status, prices: PriceController | None) -> BudgetView:
    scope = status.scope
    price = math.inf if prices is None else prices.price([scope])
    return {
        "scope": "tenant" if scope.kind == "tenant" else "global",
        "tenant": scope.key if scope.kind == "tenant" else None,
        "limit": cast(Limit, cast(Any, scope.limit).model_dump(exclude_none=True)),  # as JSON has it
        "spent": shown(scope.limit, status.spent),
        "reserved": shown(scope.limit, status.reserved),
        "remaining": shown(scope.limit, status.remaining),
        "student_tokens": status.student_tokens,
        "rate": None if status.rate is None else round(status.rate, 6),
        "reset_seconds": status.reset_seconds,
        "aim": None if prices is None else round(prices.rate([scope]), 6),
        "price": price if math.isfinite(price) else None,
    }


def _tenant(tenant: Tenant) -> dict[str, Any]:
    return tenant.model_dump(exclude={"keys", "limits"}, exclude_none=True)
