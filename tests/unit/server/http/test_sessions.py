"""Requests that name a session, from the field or header to the report."""

from types import SimpleNamespace
from typing import Any

import pytest

from router.controller import PriceController
from router.ledger import MemoryLedger
from server.exchange import Report
from server.sessions import SessionLimits
from server.shared_budgets import SharedBudgets
from server.tenants import Tenant, hash_key
from tests.helpers.scripted_pair import CALIBRATION
from tests.helpers.upstream import Upstream, post, request

RUN = {"id": "run-7", "tokens": 500}


class Gateway:
    """An app with budgets that gets requests of several tenants."""

    def __init__(self, *, prices: object = None, most: int = 2) -> None:
        prices_of_gate = PriceController(CALIBRATION, 2)
        self.shared = SharedBudgets(MemoryLedger(), prices_of_gate, sessions=SessionLimits(3600, most))
        self.cooperation = SimpleNamespace(shared=self.shared, prices=prices)
        self.upstream = Upstream(reports=(Report(completion_tokens=4, finished=True),))

    async def ask(self, *headers: tuple[str, str], tenant: str | None = None, **fields: Any) -> Any:
        engine = SimpleNamespace(cooperation=self.cooperation)
        more: dict[str, Any] = {"app": SimpleNamespace(state=SimpleNamespace(engine_client=engine))}
        if tenant is not None:
            more["state"] = {"tenant": Tenant(name=tenant, keys=(hash_key(tenant),))}
        return await post(self.upstream, request(**fields), headers=headers, more=more)


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


async def test_the_session_is_taken_out_of_the_body_and_reported(gateway):
    answer = await gateway.ask(teacher_session=RUN)
    assert b"teacher_session" not in gateway.upstream.body
    assert answer.json["teacher"]["session"] == {"id": "run-7", "tokens": 500, "tokens_spent": 0}


async def test_later_requests_need_the_id_alone_in_a_field_or_a_header(gateway):
    await gateway.ask(teacher_session=RUN)
    for headers, fields in (
        ((), {"teacher_session": "run-7"}),
        ((("X-Teacher-Session", "run-7"),), {}),
        ((("X-Teacher-Session", '{"id": "run-7", "tokens": 500}'),), {}),
        ((("X-Teacher-Session", "nobody-asks"),), {"teacher_session": "run-7"}),  # the body's wins
        ((), {"teacher_session": "run-7", "teacher_budget": 0.1}),
    ):
        answer = await gateway.ask(*headers, **fields)
        assert answer.json["teacher"]["session"]["tokens"] == 500


async def test_a_stream_has_the_session_on_its_last_chunk(gateway):
    gateway.upstream.content_type = "text/event-stream"
    gateway.upstream.chunks = (
        b'data: {"id":"1","choices":[{"index":0,"text":"a"}]}\n\n',
        b'data: {"id":"1","choices":[{"index":0,"text":"b","finish_reason":"stop"}]}\n\n',
        b"data: [DONE]\n\n",
    )

    def before_chunk(index: int, exchange: Any) -> None:
        exchange.reports[0].finished = index > 0

    gateway.upstream.before_chunk = before_chunk
    first, last = (await gateway.ask(teacher_session=RUN)).events
    assert "teacher" not in first
    assert last["teacher"]["session"] == {"id": "run-7", "tokens": 500, "tokens_spent": 0}


async def test_a_conflict_is_refused(gateway):
    await gateway.ask(teacher_session=RUN)
    answer = await gateway.ask(teacher_session=RUN | {"tokens": 501})
    assert answer.status == 400
    assert answer.json["error"]["param"] == "teacher_session"
    assert "'run-7' already has a different budget" in answer.json["error"]["message"]
    assert gateway.upstream.calls == 1


async def test_a_new_session_without_a_budget_is_refused(gateway):
    answer = await gateway.ask(("X-Teacher-Session", "run-7"))
    assert answer.status == 400
    assert answer.json["error"]["param"] == "X-Teacher-Session"
    assert "its first request must set tokens or cost" in answer.json["error"]["message"]


async def test_tenants_have_sessions_of_their_own(gateway):
    await gateway.ask(teacher_session=RUN, tenant="acme")
    assert (await gateway.ask(teacher_session="run-7", tenant="other")).status == 400
    answer = await gateway.ask(teacher_session=RUN | {"tokens": 8}, tenant="other")
    assert answer.json["teacher"]["session"]["tokens"] == 8


async def test_one_session_too_many_is_refused(gateway):
    for name in ("a", "b"):
        await gateway.ask(teacher_session={"id": name, "tokens": 1})
    answer = await gateway.ask(teacher_session={"id": "c", "tokens": 1})
    assert answer.status == 429
    assert answer.json["error"]["type"] == "RateLimitError"
    assert answer.json["error"]["param"] == "teacher_session"


async def test_a_cost_without_prices_is_refused(gateway):
    answer = await gateway.ask(teacher_session={"id": "run-7", "cost": 0.01})
    assert answer.status == 400
    assert "teacher_session.cost: this gateway has no prices" in answer.json["error"]["message"]
    priced = Gateway(prices=object())
    answer = await priced.ask(teacher_session={"id": "run-7", "cost": 0.01, "tokens": 9})
    session = answer.json["teacher"]["session"]
    assert session == {"id": "run-7", "tokens": 9, "tokens_spent": 0, "cost": 0.01, "cost_spent": 0}


@pytest.mark.parametrize(
    "session",
    [
        "",
        "a/b",
        "a b",
        "x" * 129,
        7,
        True,
        ["a"],
        {"tokens": 5},
        {"id": 7, "tokens": 5},
        {"id": "a", "tokens": -1},
        {"id": "a", "tokens": 2**53 + 2},
        {"id": "a", "tokens": 1.5},
        {"id": "a", "cost": -1},
        {"id": "a", "fraction": 0.5},
    ],
)
async def test_a_wrong_session_is_refused(gateway, session):
    answer = await gateway.ask(teacher_session=session)
    assert answer.status == 400
    assert answer.json["error"]["param"] == "teacher_session"
    assert (
        'expected an id of letters, digits and ._:-, or an object with "id"'
        in answer.json["error"]["message"]
    )
    assert gateway.upstream.calls == 0


@pytest.mark.parametrize("header", ["a b", "{", '{"id": 7}', "x" * 129, '"run-7"'])
async def test_a_wrong_session_in_a_header_is_refused(gateway, header):
    answer = await gateway.ask(("X-Teacher-Session", header), teacher_session=RUN)
    assert answer.status == 400
    assert answer.json["error"]["param"] == "X-Teacher-Session"


async def test_a_session_of_null_is_none(gateway):
    assert "session" not in (await gateway.ask(teacher_session=None)).json["teacher"]
