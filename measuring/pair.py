"""Starts a teacher's stock vLLM server and a gateway on this machine, from the checkpoints of one pair."""

import itertools
import os
import random
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from measuring.processes import Child, Service, running

HOST = "127.0.0.1"
# vLLM's own console script fails in its CPU build; this is what it would run.
STOCK_SERVER = (sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry")
GATEWAY = (sys.executable, "-m", "wheels", "serve")
START_SECONDS = 600.0
SERVER_PORTS = range(16_384, 32_768)
"""Linux gives the ports from 32768 on to outgoing connections."""

COUNTED = ("--enable-prompt-tokens-details",)  # prompt tokens from the prefix cache have a lower price
# The pair was trained and calibrated in float32; compiling takes longer than a tiny model can win back.
EXACT = ("--dtype", "float32", "--enforce-eager")
UNIPROC = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
# Two engines on one GPU: each takes a fixed cache, as profiling would count the other's memory as its own.
GPU_SHARE = ("--gpu-memory-utilization", "0.3", "--kv-cache-memory-bytes", "1G")
QUIET = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class Pair:
    """Checkpoints of two models with one vocabulary, and the router between them."""

    teacher: Path
    student: Path
    router: Path | None
    """Directory of the router; None: an untrained gate decides, and learns its price."""

    @classmethod
    def in_directory(cls, directory: Path) -> "Pair":
        """The pair whose checkpoints have their usual names."""
        return cls(directory / "teacher", directory / "student", directory / "router")

    def missing(self) -> list[Path]:
        """The checkpoints whose directories do not exist."""
        checkpoints = [self.teacher, self.student]
        if self.router is not None:
            checkpoints.append(self.router)
        return list(itertools.filterfalse(Path.is_dir, checkpoints))


@dataclass(frozen=True)
class Serving:
    """A running pair: its URLs and its two processes."""

    teacher: str
    """Base URL of the teacher's server, without /v1."""
    gateway: str
    """Base URL of the gateway, without /v1."""
    teacher_process: Child
    gateway_process: Child

    def check(self) -> None:
        """Check that both processes run.

        Raises:
            ServiceError: one of the two has ended.
        """
        self.teacher_process.check()
        self.gateway_process.check()


@contextmanager
def serving(
    pair: Pair,
    logs: Path,
    *,
    port: int | None = None,
    flags: Sequence[str] = (),
    teacher_flags: Sequence[str] = (),
    timeout: float = START_SECONDS,
    watch: Callable[[list[Child]], None] = lambda children: None,
) -> Iterator[Serving]:
    """Start teacher and gateway at once; yields when both are ready, ends both when the block is left.

    Args:
        pair: the checkpoints.
        logs: directory for the log file of each server.
        port: port of the gateway; None: a free one.
        flags: further flags of `wheels serve`.
        teacher_flags: further flags of the teacher's server.
        timeout: longest wait, in seconds.
        watch: called at every poll while waiting.

    Raises:
        ServiceError: a server did not become ready.
    """
    teacher = f"http://{HOST}:{free_port()}"
    gateway = f"http://{HOST}:{port or free_port()}"
    services = (
        teacher_service(pair.teacher, teacher, logs, flags=teacher_flags),
        gateway_service(pair, teacher, gateway, logs, flags),
    )
    with running(services, timeout=timeout, watch=watch) as (teacher_process, gateway_process):
        yield Serving(teacher, gateway, teacher_process, gateway_process)


def teacher_service(
    model: Path,
    url: str,
    logs: Path,
    name: str = "teacher",
    *,
    cores: Sequence[int] = (),
    threads: int = 1,
    flags: Sequence[str] = (),
) -> Service:
    """A stock vLLM server of one model.

    Args:
        model: directory of the model's checkpoint.
        url: base URL to serve at.
        logs: directory for the log.
        name: name of the service, and of the model in requests.
        cores: without a GPU, the cores that the model computes on in a process of its own, as indices of
            our cores. Empty: it computes in the engine's process, as on one GPU.
        threads: number of threads of the model, without a GPU and if ``cores`` is empty.
        flags: further flags of vLLM's server.
    """
    cpu = is_cpu_build()
    arguments = ("--model", str(model), "--served-model-name", name, "--uvicorn-log-level", "warning")
    device = ("--block-size", "32", *_executor(cores)) if cpu else GPU_SHARE
    return Service(
        name=name,
        command=(*STOCK_SERVER, *arguments, *_address(url), *COUNTED, *EXACT, *device, *flags),
        ready_url=f"{url}/health",
        log=logs / f"{name}.log",
        environment=QUIET | (_threads(cores, threads) if cpu else {}),
    )


def gateway_service(
    pair: Pair,
    teacher: str,
    url: str,
    logs: Path,
    flags: Sequence[str] = (),
    name: str = "gateway",
    *,
    cores: Sequence[int] = (),
    threads: int = 1,
    engine_flags: Sequence[str] = (),
) -> Service:
    """`wheels serve` for the pair.

    Args:
        pair: checkpoints of the student and the router.
        teacher: base URL of the teacher's server.
        url: base URL to serve at.
        logs: directory for the log.
        flags: further flags of `wheels serve`.
        name: name of the service.
        cores: as in `teacher_service`.
        threads: as in `teacher_service`.
        engine_flags: further flags of vLLM's server, for the student.
    """
    cpu = is_cpu_build()
    router = () if pair.router is None else ("--router", str(pair.router))
    models = ("--student", str(pair.student), *router)
    # Both start at once, so the gateway waits for its teacher instead of refusing to start.
    partner = ("--teacher", teacher, "--teacher-wait", f"{START_SECONDS:.0f}")
    device = _executor(cores) if cpu else GPU_SHARE
    vllm = ("--", *EXACT, "--uvicorn-log-level", "warning", *device, *engine_flags)
    return Service(
        name=name,
        command=(*GATEWAY, *models, *partner, *_address(url), *flags, *vllm),
        ready_url=f"{url}/ready",
        log=logs / f"{name}.log",
        environment=QUIET | (_threads(cores, threads) if cpu else {}),
    )


def free_port(preferred: int | None = None) -> int:
    """A loopback port that nobody uses now: the preferred one if it is free.

    A server binds its port seconds later. Until then the kernel must not give it to an outgoing connection,
    and another process that asks for a port at the same time should not draw it either.
    """
    candidates = random.SystemRandom().sample(SERVER_PORTS, 100)
    if preferred is not None:
        candidates.insert(0, preferred)
    for port in candidates:
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
            probe.bind((HOST, port))
            return port
    raise OSError("no free port")


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build; read from its metadata, as importing it takes seconds."""
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        return True


def _address(url: str) -> list[str]:
    host, port = url.removeprefix("http://").split(":")
    return ["--host", host, "--port", port]


def _executor(cores: Sequence[int]) -> tuple[str, ...]:
    """Flags of vLLM for its executor and cache.

    With cores, vLLM starts a worker process, which it can bind to them. Without, the model computes in the
    engine's process, which starts in half the time. That executor is named by its path: vLLM's CPU build
    refuses the short name `uni`, as it could not bind it. The cache is small there: several engines of tiny
    models have to fit into the memory of the tests.
    """
    if cores:
        return ("--kv-cache-memory-bytes", "1G")
    return ("--distributed-executor-backend", UNIPROC, "--kv-cache-memory-bytes", "256M")


def _threads(cores: Sequence[int], threads: int) -> dict[str, str]:
    """Environment variables of vLLM for a model's cores or threads.

    A tiny model has one thread: several would only wait for each other.
    """
    if not cores:
        return {"OMP_NUM_THREADS": str(threads)}
    available = sorted(os.sched_getaffinity(0))
    chosen = [str(available[index]) for index in cores]
    return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(chosen)}
