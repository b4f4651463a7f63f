"""The servers that a section measures, and one measurement of one of them."""

import asyncio
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from measuring.pair import HOST, START_SECONDS, Pair, free_port, gateway_service, teacher_service
from measuring.processes import Child, Service, running
from server.bench.cpu import Usage, usage
from server.bench.engine_metrics import EngineWork, Scrape
from server.bench.load import BenchRequest, LoadRun, drive
from server.bench.plan import Plan
from server.http.lifecycle import KEEP_ALIVE_SECONDS

GATEWAY_MODEL = "wheels"
FIRST = (0,)
"""Cores of a student."""
LAST = (-1,)
"""Cores of a teacher that runs at the same time."""
BOTH = (0, -1)
"""Cores of a server that runs alone."""

QUIET_SECONDS = 1.5
"""Pause between measurements: an engine and its worker poll for a second after their last step, perhaps on
the next server's core.
"""

T = TypeVar("T")


@dataclass(frozen=True)
class MeasuredServer:
    """Something that answers like OpenAI, and one of its models."""

    url: str
    model: str
    child: Child
    """The process whose CPU time counts."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields that are sent with every request."""
    engine: str = ""
    """Base URL of the engine behind a proxy; empty if the server is an engine."""

    @property
    def engine_url(self) -> str:
        """Base URL of the engine."""
        return self.engine or self.url

    def with_budget(self, budget: float) -> "MeasuredServer":
        """The same gateway, asked with another `teacher_budget`."""
        return replace(self, fields={**self.fields, "teacher_budget": budget})


@dataclass(frozen=True)
class Sample:
    """Measurements of one load on one server."""

    run: LoadRun
    """The load as its client saw it."""
    usage: Usage
    """CPU time and memory of the server, from /proc."""
    growth: Scrape
    """Growth of the server's Prometheus series."""
    teacher: EngineWork | None = None
    """Work of the teacher behind a gateway; None if it was not measured."""

    @property
    def work(self) -> EngineWork:
        """Work of the server's engine, by its own account."""
        return EngineWork.from_growth(self.growth)


class StudentServers(NamedTuple):
    """Two servers of one student, on the same core."""

    stock: MeasuredServer
    """vLLM's own server."""
    gateway: MeasuredServer
    """The gateway, asked with a budget of 0."""


class PairServers(NamedTuple):
    """A heavy teacher and the gateway in front of it, on a core each."""

    teacher: MeasuredServer
    gateway: MeasuredServer


def stock(checkpoint: Path, logs: Path, name: str, cores: Sequence[int], *flags: str) -> Service:
    """Service of vLLM's own server with this checkpoint."""
    url = f"http://{HOST}:{free_port()}"
    return _resettable(teacher_service(checkpoint, url, logs, name, cores=cores, flags=flags))


def gateway(pair: Pair, teacher: Service, logs: Path, *flags: str, name: str = "gateway") -> Service:
    """Service of `wheels serve` for the pair's student, in front of a teacher, on the first core."""
    url = f"http://{HOST}:{free_port()}"
    return _resettable(gateway_service(pair, base_url(teacher), url, logs, flags, name, cores=FIRST))


def students(plan: Plan) -> StudentServers:
    """Start the student behind vLLM's own server and behind a gateway."""
    teacher = stock(plan.pair.teacher, plan.work, "light-teacher", LAST)
    theirs = stock(plan.pair.student, plan.work, "stock", FIRST)
    ours = gateway(plan.pair, teacher, plan.work, name="light-gateway")
    _, direct, cooperating = plan.shared.enter_context(started([teacher, theirs], [ours]))
    return StudentServers(direct, cooperating)


def heavies(plan: Plan) -> PairServers:
    """Start the heavy teacher's server and a gateway in front of it."""
    teacher = stock(plan.heavy.teacher, plan.work, "teacher", LAST)
    ours = gateway(plan.heavy, teacher, plan.work)
    return PairServers(*plan.shared.enter_context(started([teacher], [ours])))


def base_url(service: Service) -> str:
    """Base URL of a service, without a path."""
    return service.ready_url.rpartition("/")[0]


@contextmanager
def started(services: Sequence[Service], gateways: Sequence[Service] = ()) -> Iterator[list[MeasuredServer]]:
    """Run all servers until the block's end: stock servers, then gateways (asked with a budget of 0)."""
    with running([*services, *gateways], timeout=START_SECONDS) as children:
        servers: list[MeasuredServer] = []
        for child in children:
            server = MeasuredServer(base_url(child.service), child.service.name, child)
            if child.service in gateways:
                server = replace(server, model=GATEWAY_MODEL).with_budget(0)
            servers.append(server)
        yield servers


def forget(server: MeasuredServer) -> None:
    """Empty a server's prefix cache, so that no load gains from an earlier one."""
    request = urllib.request.Request(f"{server.engine_url}/reset_prefix_cache", method="POST")
    with urllib.request.urlopen(request, timeout=10):
        pass


async def measure(
    server: MeasuredServer,
    requests: Sequence[BenchRequest],
    streams: int,
    *,
    teacher: MeasuredServer | None = None,
    stream: bool = True,
) -> Sample:
    """Measure one load, from an empty prefix cache.

    Args:
        server: the server to measure.
        requests: the requests to send; the server's own fields are added.
        streams: number of requests at a time.
        teacher: the teacher behind a gateway, if its work is to be measured too.
        stream: whether answers are streamed.

    Raises:
        ServiceError: the server has died.
    """
    before = _reset(server)
    teacher_before = _reset(teacher) if teacher else None
    start = usage(server.child.process.pid)
    requests = [replace(request, body={**request.body, **server.fields}) for request in requests]
    run = await drive(server.url, server.model, requests, streams, stream=stream)
    used = usage(server.child.process.pid).since(start)
    growth = Scrape.fetch(server.engine_url).since(before)
    if teacher is None or teacher_before is None:
        return Sample(run, used, growth)
    teacher_growth = Scrape.fetch(teacher.engine_url).since(teacher_before)
    return Sample(run, used, growth, EngineWork.from_growth(teacher_growth))


def _reset(server: MeasuredServer) -> Scrape:
    """Empty the server's prefix cache; returns its series until now."""
    server.child.check()
    forget(server)
    return Scrape.fetch(server.engine_url)


async def in_turn(
    sides: Mapping[str, Callable[[int], Awaitable[T]]], rounds: int, pause: float = QUIET_SECONDS
) -> dict[str, list[T]]:
    """Measure every side once per round, in alternating order, with a pause before each.

    Args:
        sides: functions that measure a side, by name; they get the number of the round.
        rounds: number of rounds.
        pause: seconds of silence before each measurement.

    Returns:
        The results of each side, in the order of rounds.
    """
    names = list(sides)
    results: dict[str, list[T]] = {}
    for name in names:
        results[name] = []
    for turn in range(rounds):
        for name in names if turn % 2 else reversed(names):
            await asyncio.sleep(pause)
            results[name].append(await sides[name](turn))
    return results


def _resettable(service: Service) -> Service:
    # The first opens vLLM's endpoint that empties the prefix cache. With the second, vLLM's own server
    # keeps idle connections for as long as the gateway does.
    ours = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_SECONDS)}
    return replace(service, environment={**service.environment, **ours})
