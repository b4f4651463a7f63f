"""Starts the servers of the router stage that have no address in the recipe, and always stops them.

They are the commands that a user would run: vLLM's own server for the teacher, and `wheels serve` for the
student. They listen only on this machine.
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
"""Flags that fix the key-value cache's size: otherwise each engine counts the other's memory as its own."""
READ_AT_ONCE = "512"
"""Prompt tokens that the teacher reads in one step, whose log-probabilities all exist at the same time."""
PATIENT = ("--teacher-timeout", "600", "--span-timeout", "600", "--teacher-queue", "600")
"""Long timeouts of the gateway: nobody waits for these completions, so a slow teacher counts as alive."""
DYING_SECONDS = 1.0
"""Time for a server to exit after it has closed its connections."""
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
"""Environment variables hidden from the servers: a key, and a place among the processes of `torchrun`."""


class StartedTeacher(ServedConfig):
    """A teacher whose server has another address at each start."""

    directory: Path
    """Directory of the model."""

    @property
    def known_as(self) -> str:
        """Name under which the cache keeps its answers: its directory, because its address changes."""
        return str(self.directory.resolve())


class Servers(NamedTuple):
    """The servers to start, and their addresses."""

    services: list[Service]
    teacher: ServedConfig
    """The teacher, with its address."""
    gateway: str
    """Base URL of the gateway, without /v1."""
    router: Path
    """Directory from which the gateway loads routers."""
    logs: Path


@contextmanager
def with_addresses(space: Workspace) -> Iterator[Workspace]:
    """The workspace with a recipe in which teacher and gateway have addresses.

    If the recipe leaves the start of the gateway to the stage, the servers run until the block ends. If not,
    this is `space` itself.

    Raises:
        RecipeError: a model is not trained yet.
        ServiceError: as `started` raises it.
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
    """Run these servers until the block ends, and give the workspace with their addresses in its recipe.

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
            for child in children:  # the log of a dead server explains more than this error
                with suppress(TimeoutExpired):
                    child.process.wait(DYING_SECONDS)
                child.check()
            error.add_note(f"Logs: {servers.logs}")
            raise


def to_start(space: Workspace, rollouts: GatewayRollouts) -> Servers:
    """The servers to start: the gateway, and the teacher's server if the teacher is not behind a URL.

    The gateway starts without a router, even if an earlier start left one: the stage gives it the router to
    go on with.
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
    """The directory of an exported model. Raises RecipeError if it is not trained yet."""
    if not space.is_exported(role):
        raise RecipeError(f"no {role} in {space.exported(role)}: train it first (--stage {role})")
    return space.exported(role)


def threads_of_an_engine(threads: int) -> int:
    """Threads of one engine: half of the recipe's, because two engines compute at once.

    A thread without a core of its own makes all others wait.
    """
    return max(1, threads // 2)


def engine_flags(dtype: str) -> tuple[str, ...]:
    """Flags of vLLM for a model that computes in `dtype`, with its context cut to what the cache holds."""
    device = ON_CPU if is_cpu_build() else ON_GPU
    return ("--dtype", dtype, "--max-model-len", "auto", *device)
