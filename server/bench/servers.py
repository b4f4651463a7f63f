"""The servers that a section measures, and one measurement of one of them."""

import asyncio
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from server.bench.cpu import Usage, usage
from server.bench.engine_metrics import EngineWork, Scrape
from server.bench.load import Call, Run, drive
from server.bench.plan import Plan
from server.http.lifecycle import KEEP_ALIVE_SECONDS
from server.local.pair import HOST, START_SECONDS, Pair, free_port, gateway_service, teacher_service
from server.local.processes import Child, Service, running

GATEWAY_MODEL = "wheels"
FIRST, LAST = (0,), (-1,)
"""Cores: of a student, and of a teacher beside it."""
BOTH = (0, -1)

QUIET_SECONDS = 1.5
"""An engine and its worker poll for a second after their last step, on a core that the next one may need."""

T = TypeVar("T")


@dataclass(frozen=True)
class Server:
    """Something that answers like OpenAI, and which model of it we mean."""

    url: str
    model: str
    child: Child
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Sent with every request."""
    engine: str = ""
    """Base URL of the engine behind a proxy; empty where the server is one."""

    @property
    def engine_url(self) -> str:
        return self.engine or self.url

    def at(self, budget: float) -> "Server":
        """The same gateway, asked with another `teacher_budget`."""
        return replace(self, fields={**self.fields, "teacher_budget": budget})


@dataclass(frozen=True)
class Sample:
    """What one load on one server did: as its client saw it, by the engine's account, and in /proc."""

    run: Run
    usage: Usage
    growth: Scrape
    """Of the server's series."""
    teacher: EngineWork | None = None
    """Of the teacher behind a gateway."""

    @property
    def work(self) -> EngineWork:
        return EngineWork.of(self.growth)


def stock(checkpoint: Path, logs: Path, name: str, cores: Sequence[int], *flags: str) -> Service:
    """vLLM's own server."""
    url = f"http://{HOST}:{free_port()}"
    return _resettable(teacher_service(checkpoint, url, logs, name, cores=cores, flags=flags))


def gateway(pair: Pair, teacher: Service, logs: Path, *flags: str, name: str = "gateway") -> Service:
    """`wheels serve` for the pair's student, in front of a teacher, on the first core."""
    url = f"http://{HOST}:{free_port()}"
    return _resettable(gateway_service(pair, base_url(teacher), url, logs, flags, name, cores=FIRST))


def students(plan: Plan) -> tuple[Server, Server]:
    """vLLM's own server with the student and a gateway (asked with a budget of 0), on the same core."""
    teacher = stock(plan.pair.teacher, plan.work, "light-teacher", LAST)
    theirs = stock(plan.pair.student, plan.work, "stock", FIRST)
    ours = gateway(plan.pair, teacher, plan.work, name="light-gateway")
    _, direct, behind = plan.open.enter_context(started([teacher, theirs], [ours]))
    return direct, behind


def heavies(plan: Plan) -> tuple[Server, Server]:
    """The heavy teacher's server and a gateway in front of it, on a core each."""
    teacher = stock(plan.heavy.teacher, plan.work, "teacher", LAST)
    behind, ours = plan.open.enter_context(started([teacher], [gateway(plan.heavy, teacher, plan.work)]))
    return behind, ours


def base_url(service: Service) -> str:
    return service.ready_url.rpartition("/")[0]


@contextmanager
def started(services: Sequence[Service], gateways: Sequence[Service] = ()) -> Iterator[list[Server]]:
    """All of them, ready; first the stock servers, then the gateways (asked with a budget of 0)."""
    with running([*services, *gateways], timeout=START_SECONDS) as children:
        servers = [Server(base_url(child.service), child.service.name, child) for child in children]
        yield [
            replace(server, model=GATEWAY_MODEL, fields={"teacher_budget": 0})
            if server.child.service in gateways
            else server
            for server in servers
        ]


def forget(server: Server) -> None:
    """Empty a server's prefix cache, so that no load is quicker because another came before it."""
    request = urllib.request.Request(f"{server.engine_url}/reset_prefix_cache", method="POST")
    with urllib.request.urlopen(request, timeout=10):
        pass


async def measure(
    server: Server,
    calls: Sequence[Call],
    streams: int,
    *,
    teacher: Server | None = None,
    stream: bool = True,
) -> Sample:
    """One load, from an empty prefix cache; ``teacher`` is the one behind a gateway.

    Raises:
        ServiceError: the server has died.
    """
    engines = [server] if teacher is None else [server, teacher]
    for engine in engines:
        engine.child.check()
        forget(engine)
    before = [Scrape.of(engine.engine_url) for engine in engines]
    start = usage(server.child.process.pid)
    calls = [replace(call, body={**call.body, **server.fields}) for call in calls]
    run = await drive(server.url, server.model, calls, streams, stream=stream)
    used = usage(server.child.process.pid).since(start)
    growth = [Scrape.of(engine.engine_url).since(old) for engine, old in zip(engines, before, strict=True)]
    return Sample(run, used, growth[0], EngineWork.of(growth[1]) if teacher else None)


async def in_turn(
    sides: Mapping[str, Callable[[int], Awaitable[T]]], rounds: int, pause: float = QUIET_SECONDS
) -> dict[str, list[T]]:
    """Every side once per round (it is told which), in alternating order, with silence before each."""
    results: dict[str, list[T]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides) if turn % 2 else reversed(list(sides)):
            await asyncio.sleep(pause)
            results[name].append(await sides[name](turn))
    return results


def _resettable(service: Service) -> Service:
    # The first is the only way to vLLM's endpoint that empties the prefix cache; by the second vLLM's own
    # server keeps idle connections as the gateway does.
    ours = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_SECONDS)}
    return replace(service, environment={**service.environment, **ours})
