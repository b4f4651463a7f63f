"""Tenants, the limits in their responses' headers, and the admin's view."""

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from router.budget import Budget
from router.controller import PriceController
from router.ledger import FractionOfTraffic, MemoryLedger, Scope, TokensPerWindow
from router.policy import Calibration
from server.config import ConfigError
from server.http.budgets import view
from server.http.ratelimit import duration, headers, retry_after
from server.tenants import BudgetRefused, Resolved, Tenant, Tenants, hash_key
from tests.helpers.ledger_machine import Clock

LIMIT = {"type": "tokens", "tokens": 100, "window_seconds": 60}
SERVER_DEFAULT = Budget(fraction=0.1)


def entry(name: str = "acme", key: str = "secret", **settings: object) -> dict[str, object]:
    return {"name": name, "keys": [hash_key(key)], **settings}


def tenant(**settings: object) -> Tenant:
    return Tenant.model_validate(entry(**settings))


def write(path: Path, *entries: dict[str, object], **others: object) -> None:
    path.write_text(yaml.safe_dump({"tenants": list(entries), **others}))


# Keys


def test_a_hash_is_the_output_of_sha256sum() -> None:
    assert hash_key("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture
def tenants(tmp_path: Path) -> Tenants:
    path = tmp_path / "tenants.yaml"
    write(
        path,
        entry("acme", "first") | {"keys": [hash_key("first"), hash_key("second")]},
        entry("other", "third"),
        admin_keys=[hash_key("root")],
    )
    return Tenants(str(path))


@pytest.mark.parametrize(
    ("credential", "name"),
    [
        ("Bearer first", "acme"),
        ("bearer second", "acme"),
        ("third", "other"),
        ("Bearer fourth", None),
        ("Basic first", None),
        ("Bearer ", None),
        ("", None),
        (None, None),
        ("Bearer " + hash_key("first"), None),
        ("Bearer schlüssel", None),
    ],
)
def test_a_key_belongs_to_its_tenant(tenants: Tenants, credential: str | None, name: str | None) -> None:
    owner = tenants.authenticate(credential)
    assert (owner and owner.name) == name


def test_the_admin_is_no_tenant(tenants: Tenants) -> None:
    assert tenants.authenticate("Bearer root") == "admin"


def test_keys_are_not_kept_in_plain_text(tenants: Tenants) -> None:
    assert not any(key in repr(vars(tenants)) for key in ("'first'", "'root'"))


# The file


def test_tenants_can_come_from_an_environment_variable() -> None:
    source = json.dumps({"tenants": [entry(default_budget=0.2)]})
    tenants = Tenants(source)
    assert tenants.authenticate("Bearer secret").default_budget == Budget(fraction=0.2)
    assert not tenants.reload()


def test_a_changed_file_is_taken_on_reload(tmp_path: Path) -> None:
    path = tmp_path / "tenants.yaml"
    write(path, entry("acme", "old"))
    tenants = Tenants(str(path))
    assert not tenants.reload(), "nothing changed"
    write(path, entry("acme", "new"))
    os.utime(path, ns=(1, 1))
    assert tenants.reload()
    assert tenants.authenticate("Bearer old") is None
    assert tenants.authenticate("Bearer new").name == "acme"


def test_an_unusable_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tenants.yaml"
    write(path, entry())
    tenants = Tenants(str(path))
    path.write_text("tenants: [{name: acme}]")
    with pytest.raises(ConfigError, match=r"tenants\.0\.keys: Field required"):
        tenants.reload()
    path.unlink()
    with pytest.raises(ConfigError, match="cannot read"):
        tenants.reload()
    assert tenants.authenticate("Bearer secret").name == "acme"


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came true")


async def test_a_changed_file_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tenants.yaml"
    write(path, entry("acme", "old"))
    tenants = Tenants(str(path))
    watching = asyncio.create_task(tenants.watch(0.01))
    path.write_text("nonsense: true")
    await until(lambda: "were not reloaded" in caplog.text)
    scratch = tmp_path / "scratch"
    write(scratch, entry("acme", "new"))
    scratch.rename(path)
    await until(lambda: tenants.authenticate("Bearer new") is not None)
    assert tenants.authenticate("Bearer old") is None
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching


@pytest.mark.parametrize(
    "content",
    [b"tenants: [{name: \xff\xfe}]", b"tenants: 2024-13-45", b"[", b"[" * 1000, b"tenants: 5", b"\0"],
    ids=["not UTF-8", "no date", "no end", "deep", "a number", "no text"],
)
async def test_an_unusable_file_does_not_end_the_watch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    path = tmp_path / "tenants.yaml"
    write(path, entry("acme", "old"))
    tenants = Tenants(str(path))
    watching = asyncio.create_task(tenants.watch(0.01))
    path.write_bytes(content)
    await until(lambda: "were not reloaded" in caplog.text)
    assert "\n" not in caplog.records[-1].message
    assert tenants.authenticate("Bearer old") is not None
    write(path, entry("acme", "newer"))
    await until(lambda: tenants.authenticate("Bearer newer") is not None)
    assert caplog.text.count("were not reloaded") == 1, "it is logged once"
    watching.cancel()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"tenant": []}, "tenant: unknown field"),
        ({"tenants": [entry(budget=0.1)]}, r"tenants\.0\.budget: unknown field"),
        ({"tenants": [entry() | {"keys": ["secret"]}]}, r"tenants\.0\.keys\.0: String should match"),
        ({"tenants": [entry() | {"keys": []}]}, r"tenants\.0\.keys"),
        ({"tenants": [entry() | {"name": "a b"}]}, r"tenants\.0\.name"),
        ({"tenants": [entry("a"), entry("a", "other")]}, "two tenants named a"),
        ({"tenants": [entry("a"), entry("b")]}, "two uses of the key"),
        ({"tenants": [entry()], "admin_keys": [hash_key("secret")]}, "two uses of the key"),
        ({"tenants": [entry(default_budget=0.3, maximum_budget=0.2)]}, "default_budget is more"),
        ({"tenants": [entry(default_budget=1.5)]}, r"tenants\.0\.default_budget"),
        ({"tenants": [entry(priority=0)]}, r"tenants\.0\.priority"),
        ({"tenants": [entry(over_maximum="ignore")]}, r"tenants\.0\.over_maximum"),
        ({"tenants": [entry(limits=[{"type": "calls", "calls": 3}])]}, r"tenants\.0\.limits\.0"),
        (
            {"tenants": [entry(limits=[LIMIT, LIMIT | {"tokens": 2}])]},
            "two limits have the same type and window",
        ),
    ],
)
def test_wrong_files_name_what_is_wrong(tmp_path: Path, content: dict[str, object], message: str) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=message):
        Tenants(str(path))


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        Tenants(str(tmp_path / "absent.yaml"))
    with pytest.raises(ConfigError, match="cannot read the tenants"):
        Tenants("{tenants: [")
    with pytest.raises(ConfigError, match="two entries named 'tenants'"):
        Tenants("{tenants: [], tenants: []}")


def test_tenants_are_frozen() -> None:
    with pytest.raises(ValidationError):
        tenant().name = "other"


# Budgets


@pytest.mark.parametrize(
    ("settings", "requested", "budget", "clamped"),
    [
        ({}, None, SERVER_DEFAULT, False),
        ({}, Budget(fraction=1), Budget(fraction=1), False),
        ({"default_budget": 0.2}, None, Budget(fraction=0.2), False),
        ({"default_budget": 0.2}, Budget(fraction=0.9), Budget(fraction=0.9), False),
        ({"maximum_budget": 0.05}, None, Budget(fraction=0.05), False),
        ({"maximum_budget": 0.3}, Budget(fraction=0.3), Budget(fraction=0.3), False),
        ({"maximum_budget": 0.3}, Budget(fraction=0.5), Budget(fraction=0.3), True),
        ({"maximum_budget": 0.3}, Budget(tokens=50), Budget(fraction=0.3, tokens=50), False),
        ({"maximum_budget": {"tokens": 9}}, Budget(fraction=1), Budget(fraction=1, tokens=9), False),
        (
            {"maximum_budget": {"fraction": 0.3, "calls": 4}},
            Budget(fraction=0.1, calls=9, tokens=8),
            Budget(fraction=0.1, calls=4, tokens=8),
            True,
        ),
        ({"maximum_budget": 0}, Budget(fraction=0.5), Budget(fraction=0), True),
    ],
)
def test_a_tenants_budget_is_its_own_or_the_default(
    settings: dict[str, object], requested: Budget | None, budget: Budget, clamped: bool
) -> None:
    assert tenant(**settings).resolve(requested, SERVER_DEFAULT) == Resolved(budget, clamped)


def test_over_the_maximum_may_be_refused() -> None:
    strict = tenant(maximum_budget={"fraction": 0.3, "tokens": 40}, over_maximum="refuse")
    with pytest.raises(BudgetRefused, match=r"fraction 0\.5 is more than this key's maximum of 0\.3"):
        strict.resolve(Budget(fraction=0.5), SERVER_DEFAULT)
    assert strict.resolve(Budget(fraction=0.2), SERVER_DEFAULT).budget == Budget(fraction=0.2, tokens=40)
    lowered = strict.resolve(None, Budget(fraction=0.9))
    assert lowered == Resolved(Budget(fraction=0.3, tokens=40), clamped=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"default_budget": {"fraction": 0.1, "teachers": ["huge"]}},
        {"maximum_budget": {"fraction": 0.1, "teachers": ["huge"]}},
        {"limits": [LIMIT | {"teacher": "huge"}]},
    ],
)
def test_a_teacher_that_nobody_knows_is_refused(settings: dict[str, object]) -> None:
    content = json.dumps({"tenants": [{"name": "acme", "keys": [hash_key("a")], **settings}]})
    Tenants(content, teachers=["small", "huge"])
    with pytest.raises(ConfigError, match="the tenants: acme: no teacher is named 'huge'"):
        Tenants(content, teachers=["small", "big"])


def test_a_tenant_has_a_scope_for_each_limit() -> None:
    limits = [LIMIT, {"type": "fraction", "fraction": 0.2, "window_seconds": 60}]
    first, second = tenant(limits=limits).scopes
    assert first == Scope("tenant", "acme", TokensPerWindow(tokens=100, window_seconds=60))
    assert second == Scope("tenant", "acme", FractionOfTraffic(fraction=0.2, window_seconds=60))
    assert first.id != second.id


# Headers of responses


async def test_headers_show_the_limits_of_a_tenant() -> None:
    clock = Clock()
    clock.ms = 1_000_000_000
    ledger = MemoryLedger(clock=clock)
    wide = Scope("tenant", "acme", TokensPerWindow(tokens=1000, window_seconds=3600))
    narrow = Scope("tenant", "acme", TokensPerWindow(tokens=100, window_seconds=60))
    lease = await ledger.reserve([wide, narrow], 30)
    await ledger.settle(lease, 30)
    await ledger.reserve([wide, narrow], 20)
    assert headers(await ledger.status([wide, narrow])) == {
        "x-ratelimit-limit-teacher-tokens": "100",
        "x-ratelimit-remaining-teacher-tokens": "50",
        "x-ratelimit-reset-teacher-tokens": "1m1s",
    }


async def test_headers_of_a_fraction_show_what_it_allows_now() -> None:
    """60 student tokens at a quarter allow 30 teacher tokens, see the ledger's tests."""
    ledger = MemoryLedger()
    quarter = Scope("tenant", "acme", FractionOfTraffic(fraction=0.25, window_seconds=60, slack_tokens=8))
    await ledger.record([quarter], 60)
    assert headers(await ledger.status([quarter])) == {
        "x-ratelimit-limit-teacher-tokens": "30",
        "x-ratelimit-remaining-teacher-tokens": "30",
        "x-ratelimit-reset-teacher-tokens": "0s",
    }


async def test_without_limits_there_are_no_headers() -> None:
    everything = Scope("global", "", FractionOfTraffic(fraction=1, window_seconds=60))
    assert headers(await MemoryLedger().status([everything])) == {}
    assert headers([]) == {}


@pytest.mark.parametrize(("seconds", "text"), [(0.01, "1"), (1.0, "1"), (1.2, "2"), (600, "600")])
def test_the_retry_after_header_is_in_whole_seconds(seconds: float, text: str) -> None:
    assert retry_after(seconds) == {"retry-after": text}
    assert retry_after(None) == {}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.25, "250ms"), (1, "1s"), (59.2, "1m0s"), (360, "6m0s"), (3630, "1h0m30s")],
)
def test_durations_are_written_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


async def test_the_view_shows_the_budgets_of_all_tenants() -> None:
    ledger = MemoryLedger()
    acme = tenant(
        limits=[LIMIT],
        maximum_budget=0.5,
    )
    everybody = Scope("global", "", FractionOfTraffic(fraction=0.1, window_seconds=60))
    scopes = [everybody, *acme.scopes]
    await ledger.record(scopes, 90)
    lease = await ledger.reserve(scopes, 10)
    await ledger.settle(lease, 10)
    statuses = await ledger.status(scopes)
    prices = PriceController(Calibration(((0.05, 3.0), (0.5, 1.0))), span_tokens=4)
    prices.update(0.0, statuses[:1])
    answer = json.loads(json.dumps(view(statuses, [acme], prices), allow_nan=False))
    first, second = answer["budgets"]
    assert first["scope"] == "global"
    assert first["tenant"] is None
    assert first["limit"] == {"type": "fraction", "fraction": 0.1, "window_seconds": 60, "slack_tokens": 8}
    assert (first["spent"], first["reserved"], first["student_tokens"], first["rate"]) == (10, 0, 90, 0.1)
    assert first["aim"] == 0.098
    assert 2.7 < first["price"] < 2.8
    assert (second["scope"], second["tenant"], second["remaining"]) == ("tenant", "acme", 90)
    assert (second["aim"], second["price"]) == (1.0, None)
    assert answer["available"] is True
    assert answer["tenants"] == [
        {
            "name": "acme",
            "maximum_budget": {"fraction": 0.5},
            "over_maximum": "clamp",
            "exhausted": "student",
            "priority": 1.0,
        }
    ]
    assert "keys" not in json.dumps(answer)
    assert view(None, [], None) == {"available": False, "budgets": [], "tenants": []}


def test_money_needs_prices():
    for name in ("default_budget", "maximum_budget"):
        source = json.dumps({"tenants": [{"name": "acme", "keys": [hash_key("k")], name: {"cost": 0.01}}]})
        with pytest.raises(ConfigError, match=rf"acme: {name}.cost needs prices \(--prices\)"):
            Tenants(source)
        assert Tenants(source, priced=True).current.tenants[0].name == "acme"


def test_a_maximum_may_be_in_money():
    tenant = Tenant(name="acme", keys=(hash_key("k"),), maximum_budget=Budget(cost=0.01))
    assert tenant.resolve(Budget(cost=0.02, calls=3), Budget(fraction=0.1)) == (
        Budget(cost=0.01, calls=3),
        True,
    )
    assert tenant.resolve(None, Budget(fraction=0.1)).budget == Budget(fraction=0.1, cost=0.01)
