"""A real fleet: two gateways, two teachers, Redis, nginx and Prometheus. One gateway and one teacher die."""

import asyncio
import json
import shutil
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL
from typing import Any, NamedTuple

import openai
import pytest
import yaml

from measuring.pair import HOST, START_SECONDS, Pair, free_port, gateway_service, teacher_service
from measuring.processes import Child, Service, running
from tests.helpers import promql
from tests.helpers.client import PATIENCE, PRICES, UNHURRIED, chat, eventually, openai_client
from tests.helpers.paths import ROOT
from tests.helpers.redis_server import RedisServer

DEPLOY = ROOT / "deploy"
REQUESTS = 400
AT_ONCE = 24
LIMIT = 300
"""Teacher tokens for all requests together: less than half of those that they ask for at this price."""
PRICE = 0.2
LEASE_SECONDS = 6


def local() -> str:
    return f"http://{HOST}:{free_port()}"


@dataclass
class Fleet:
    """Addresses of the fleet, and the processes that die."""

    front: str
    gateways: list[str]
    prometheus: str
    redis: RedisServer
    processes: dict[str, Child]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """An instant query's result vector."""
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self.prometheus}/api/v1/query?{query}", timeout=PATIENCE) as reply:
            return json.load(reply)["data"]["result"]

    def shown(self, expression: str) -> list[dict[str, Any]]:
        """The result vector once it is not empty: a scrape of a busy server may have failed."""
        deadline = time.monotonic() + 60
        while not (result := self.query(expression)) and time.monotonic() < deadline:
            time.sleep(0.2)
        return result

    def alerts(self) -> set[str]:
        """Names of the alerts that are pending or firing."""
        return {result["metric"]["alertname"] for result in self.query("ALERTS")}

    def kill(self, name: str) -> None:
        self.processes[name].signal(SIGKILL)
        self.processes[name].process.wait()

    def budget(self) -> dict[str, Any]:
        """The global limit, as the gateway that survives sees it."""
        with urllib.request.urlopen(f"{self.gateways[1]}/budgets", timeout=PATIENCE) as reply:
            (budget,) = (b for b in json.load(reply)["budgets"] if b["limit"]["type"] == "tokens")
        return budget


class Event(NamedTuple):
    time: float
    replies: int
    """Number of replies before it."""


@dataclass
class Load:
    """The outcomes of the requests."""

    replies: list[Any] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    """Time at which each request was sent."""
    failed: list[float] = field(default_factory=list)
    """Times at which the failed requests were sent."""
    events: dict[str, "Event"] = field(default_factory=dict)

    def note(self, what: str) -> None:
        self.events[what] = Event(time.monotonic(), len(self.replies))

    @property
    def ended(self) -> int:
        return len(self.replies) + len(self.failed)


@pytest.fixture(scope="module")
def fleet(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    for program, package in (("nginx", "nginx-light"), ("prometheus", "prometheus")):
        assert shutil.which(program), f"these tests start {program} (Debian: {package})"
    directory = tmp_path_factory.mktemp("fleet")
    logs = {name: directory / name for name in ("gateway-1", "gateway-2", "teacher-1", "teacher-2")}
    for log in logs.values():
        log.mkdir()
    gateways, teachers, front, prometheus = [local(), local()], [local(), local()], local(), local()
    redis = RedisServer(directory, durable=True)
    ledger = {
        "type": "redis",
        "url": redis.url,
        "timeout": 10,  # a busy machine must not count as an outage of Redis
        "lease_seconds": LEASE_SECONDS,
        "on_expiry": "charge",
    }
    limits = [
        {"type": "tokens", "tokens": LIMIT, "window_seconds": 3600},
        {"type": "fraction", "fraction": 0.5, "window_seconds": 3600, "slack_tokens": 64},
        {"type": "cost", "cost": 1000, "window_seconds": 3600},  # this limit never binds here
    ]
    # At a fixed price nothing saves the budget, so the ledger alone makes it hold.
    flags = (
        *UNHURRIED,
        "--price",
        str(PRICE),
        "--ledger",
        json.dumps(ledger),
        "--limits",
        json.dumps(limits),
        "--prices",
        json.dumps(PRICES),
    )
    engines = {
        "gateway-1": gateway_service(pair, ",".join(teachers), gateways[0], logs["gateway-1"], flags),
        "gateway-2": gateway_service(pair, ",".join(teachers), gateways[1], logs["gateway-2"], flags),
        "teacher-1": teacher_service(pair.teacher, teachers[0], logs["teacher-1"]),
        "teacher-2": teacher_service(pair.teacher, teachers[1], logs["teacher-2"]),
    }
    # nginx avoids a gateway for five seconds after a refused connection, so it starts when both are there.
    around = [
        nginx(front, gateways, directory),
        prometheus_service(prometheus, gateways, teachers, directory),
    ]
    try:
        with (
            running(list(engines.values()), timeout=2 * START_SECONDS) as children,
            running(around, timeout=START_SECONDS),
        ):
            yield Fleet(front, gateways, prometheus, redis, dict(zip(engines, children, strict=True)))
    finally:
        redis.stop()


def nginx(front: str, gateways: list[str], directory: Path) -> Service:
    """nginx with the configuration that we ship, at other addresses."""
    text = (DEPLOY / "nginx" / "gateways.conf").read_text()
    for number, gateway in enumerate(gateways, start=1):
        assert f"server gateway-{number}:8000" in text
        text = text.replace(f"gateway-{number}:8000", gateway.removeprefix("http://"))
    text = text.replace("listen 8080", f"listen {front.removeprefix('http://')}")
    paths = "".join(
        f"{kind}_temp_path {directory}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main = directory / "nginx.conf"
    main.write_text(
        f"user root; daemon off; pid {directory}/nginx.pid; error_log stderr; events {{}}"
        f"http {{ access_log off; {paths}\n{text} }}"
    )
    command = ("nginx", "-e", "stderr", "-p", str(directory), "-c", str(main))
    return Service("nginx", command, f"{front}/health", directory / "nginx.log")


def prometheus_service(url: str, gateways: list[str], teachers: list[str], directory: Path) -> Service:
    """Prometheus with the configuration and rules that we ship, at other addresses, with short intervals."""
    config = yaml.safe_load((DEPLOY / "compose" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "2s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(path) for path in promql.RULES]
    targets = {"wheels-gateway": gateways, "wheels-teacher": teachers}
    for job in config["scrape_configs"]:
        del job["dns_sd_configs"]
        addresses = [target.removeprefix("http://") for target in targets.pop(job["job_name"])]
        job["static_configs"] = [{"targets": addresses}]
    assert not targets
    file = directory / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    address = url.removeprefix("http://")
    command = ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={directory / 'tsdb'}"]
    command.append(f"--web.listen-address={address}")
    return Service("prometheus", command, f"{url}/-/ready", directory / "prometheus.log")


@pytest.fixture(scope="module")
def load(fleet: Fleet, sources: list[str]) -> Load:
    """Requests through nginx. Meanwhile a gateway and a teacher are killed, then Redis, which comes back."""
    return asyncio.run(_load(fleet, (sources * 4)[:REQUESTS]))


async def _load(fleet: Fleet, prompts: list[str]) -> Load:
    load, turn = Load(), asyncio.Semaphore(AT_ONCE)

    async def ask(prompt: str) -> None:
        async with turn:
            sent = time.monotonic()
            try:
                reply = await chat(client, prompt, 0.5)
            except openai.OpenAIError:
                load.failed.append(sent)
            else:
                load.replies.append(reply)
                load.sent.append(sent)

    async def until(ended: int) -> None:
        while load.ended < ended:  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    async with openai_client(fleet.front) as client, asyncio.timeout(PATIENCE):
        requests = [asyncio.create_task(ask(prompt)) for prompt in prompts]
        await until(50)
        fleet.kill("gateway-1")
        load.note("gateway killed")
        await until(90)
        fleet.kill("teacher-1")
        load.note("teacher killed")
        await until(150)
        fleet.redis.stop()
        load.note("Redis killed")
        await until(190)
        fleet.redis.start()
        await asyncio.gather(*requests)
    await asyncio.sleep(LEASE_SECONDS + 3)  # dead leases are charged, and Prometheus sees all of it
    await eventually(lambda: fleet.budget()["reserved"] == 0)
    await eventually(lambda: fleet.alerts() >= {"WheelsGatewayDown", "WheelsTeacherDown"})
    return load


def test_only_requests_at_the_dead_gateway_are_lost(load: Load) -> None:
    assert load.ended == REQUESTS
    assert len(load.failed) <= AT_ONCE
    assert all(sent <= load.events["gateway killed"].time for sent in load.failed)
    assert all(reply.choices[0].finish_reason in ("stop", "length") for reply in load.replies)


def test_the_budget_holds(fleet: Fleet, load: Load) -> None:
    written = sum(reply.teacher["tokens"] for reply in load.replies)
    budget = fleet.budget()
    assert 0 < written <= budget["spent"] <= LIMIT
    assert budget["reserved"] == 0


def test_the_budget_had_to_be_enforced(load: Load) -> None:
    assert sum(reply.teacher["denied"].get("global_tokens", 0) for reply in load.replies) > 0


def test_the_other_teacher_takes_over(load: Load) -> None:
    """The test looks at requests that were sent after the first death and ended before that of Redis."""
    died, end = load.events["teacher killed"].time, load.events["Redis killed"].replies
    replies = [load.replies[i] for i in range(end) if load.sent[i] > died]
    assert len(replies) > 10
    assert sum(reply.teacher["tokens"] for reply in replies) > 0
    assert [reply.teacher["denied"] for reply in replies if reply.teacher["degraded"]] == []


@pytest.mark.parametrize("expression", promql.panel_expressions(), ids=lambda e: e.place)
def test_every_panel_shows_something(fleet: Fleet, load: Load, expression: promql.Expression) -> None:
    assert fleet.shown(expression.text), expression.text


@pytest.mark.parametrize(
    "expression", promql.rule_expressions() + promql.panel_expressions(), ids=lambda e: e.place
)
def test_every_series_exists(fleet: Fleet, load: Load, expression: promql.Expression) -> None:
    """Every series that rules and panels select is exported, with the labels by which they select it."""
    for selector in expression.selectors():
        assert fleet.shown(promql.existing(selector)), promql.existing(selector)


async def test_the_deaths_are_noticed(fleet: Fleet, load: Load) -> None:
    """Only real deaths are noticed. A survivor whose scrape failed counts as dead until the next scrape."""
    died, wrong = {"WheelsGatewayDown", "WheelsTeacherDown"}, {"WheelsNoGateway", "WheelsTeacherUnreachable"}
    await eventually(lambda: fleet.alerts() & (died | wrong) == died)
    assert fleet.alerts() & (died | wrong) == died
