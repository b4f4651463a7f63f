"""Starts and always stops the servers of the router stage for which the recipe has no address.

They are the commands that a user would run: vLLM's own server for the teacher, and `wheels serve` for the
student. They listen on this machine alone.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from subprocess import TimeoutExpired
from typing import NamedTuple

from measuring.pair import (
    HOST,
    START_SECONDS,
    Pair,
    free_port,
    gateway_service,
    is_cpu_build,
    teacher_service,
)
from measuring.processes import Service, exit_at_signals, running
from router.errors import PeerError
from training.config import RecipeError
from training.gate_config import GatewayRollouts
from training.loop.progress import console
from training.model_config import Role, ServedConfig
from training.workspace import Workspace

ON_CPU = ("--kv-cache-memory-bytes", "1G")
ON_GPU = ("--kv-cache-memory-bytes", "4G", "--no-enforce-eager")
"""The cache of keys and values is fixed, as each engine would count the other's memory as its own."""
READ_AT_ONCE = "512"
"""Tokens of prompts that the teacher reads in a step: log-probabilities of all of them exist at a time."""
PATIENT = ("--teacher-timeout", "600", "--span-timeout", "600", "--teacher-queue", "600")
"""Nobody waits for these completions: a slow teacher is not lost."""
DYING_SECONDS = 1.0
"""A server that dies closes its connections first."""
HIDDEN = (
    "VLLM_API_KEY",
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Variables that would give the servers a key, or a place among the processes of `torchrun`."""


class StartedTeacher(ServedConfig):
    """A teacher whose server has another address at each start."""

    directory: Path
    """Of the model."""

    @property
    def known_as(self) -> str:
        """What its answers are kept under."""
        return str(self.directory.resolve())


class Servers(NamedTuple):
    """What is to be started."""

    services: list[Service]
    teacher: ServedConfig
    """Its address."""
    gateway: str
    """Base URL, without /v1."""
    router: Path
    """The directory that the gateway takes routers from."""
    logs: Path


@contextmanager
def with_addresses(space: Workspace) -> Iterator[Workspace]:
    """The workspace with a recipe whose teacher and gateway have addresses.

    If the recipe's gateway is to be started, the servers run as long as the block. Else it is `space` itself.

    Raises:
        RecipeError: a model is not there yet.
        ServiceError: as `started` does.
    """
    rollouts = space.recipe.router.rollouts
    if not isinstance(rollouts, GatewayRollouts) or not rollouts.is_started:
        yield space
        return
    exit_at_signals()
    with started(space, to_start(space, rollouts)) as served:
        yield served


@contextmanager
def started(space: Workspace, servers: Servers) -> Iterator[Workspace]:
    """The workspace with a recipe that has the addresses of these servers, which run as long as the block.

    Raises:
        ServiceError: a server did not become ready, or it ended; the message ends with the tail of its log.
    """
    recipe = space.recipe
    names = " and ".join(service.name for service in servers.services)
    console.print(f"router: starting {names} (logs in {servers.logs})")
    began = time.monotonic()
    with running(servers.services, timeout=START_SECONDS) as children:
        console.print(f"router: {names} ready after {time.monotonic() - began:.0f} s")
        rollouts = recipe.router.rollouts.model_copy(
            update={"url": servers.gateway, "router": servers.router}
        )
        router = recipe.router.model_copy(update={"rollouts": rollouts})
        try:
            yield Workspace(recipe.model_copy(update={"teacher": servers.teacher, "router": router}))
        except PeerError as error:
            for child in children:  # a server that has died explains itself better
                with suppress(TimeoutExpired):
                    child.process.wait(DYING_SECONDS)
                child.check()
            error.add_note(f"Logs: {servers.logs}")
            raise


def to_start(space: Workspace, rollouts: GatewayRollouts) -> Servers:
    """The gateway, and the teacher's server if the teacher is not behind a URL.

    The gateway begins without a router, whatever an earlier start left: the stage hands over the one that
    it goes on with.
    """
    recipe = space.recipe
    logs = space.work("router") / "servers"
    router = logs / "router"
    shutil.rmtree(router, ignore_errors=True)
    router.mkdir(parents=True)
    teacher = recipe.teacher
    services = []
    if not isinstance(teacher, ServedConfig):
        model = exported(space, "teacher")
        url = f"http://{HOST}:{free_port()}"
        reading = ("--max-num-batched-tokens", READ_AT_ONCE)
        flags = (*engine_flags(teacher.dtype), *reading, *rollouts.teacher_flags)
        services.append(
            teacher_service(model, url, logs, threads=threads_of_an_engine(recipe.threads), flags=flags)
        )
        teacher = StartedTeacher(url=url, model="teacher", directory=model)
    gateway = f"http://{HOST}:{free_port()}"
    name = () if teacher.model is None else ("--teacher-model", teacher.model)
    services.append(
        gateway_service(
            Pair(space.exported("teacher"), exported(space, "student"), router),
            teacher.url,
            gateway,
            logs,
            (*PATIENT, *name),
            threads=threads_of_an_engine(recipe.threads),
            engine_flags=(*engine_flags(recipe.student.dtype), *rollouts.student_flags),
        )
    )
    services = [replace(service, hidden=HIDDEN) for service in services]
    return Servers(services, teacher, gateway, router, logs)


def exported(space: Workspace, role: Role) -> Path:
    """The directory of a model."""
    if not space.is_exported(role):
        raise RecipeError(f"no {role} in {space.exported(role)}: train it first (--stage {role})")
    return space.exported(role)


def threads_of_an_engine(threads: int) -> int:
    """Half of the trainer's: both compute at once, and a thread without a core makes all others wait."""
    return max(1, threads // 2)


def engine_flags(dtype: str) -> tuple[str, ...]:
    """Of a model that computes as in training. Its context is cut to what the cache holds."""
    device = ON_CPU if is_cpu_build() else ON_GPU
    return ("--dtype", dtype, "--max-model-len", "auto", *device)
