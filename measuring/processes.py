"""Child processes that answer over HTTP: start them together, wait until all are ready, always end them."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from router.errors import PeerError

POLL_SECONDS = 0.2
PROBE_SECONDS = 2.0
GRACE_SECONDS = 8.0
TAIL_LINES = 30
GUARD = """
import os, signal, sys, time
from contextlib import suppress

sys.stdin.read()  # ends when our parent does, however it ends
for number in (signal.SIGTERM, signal.SIGKILL):
    for group in map(int, sys.argv[2:]):
        with suppress(ProcessLookupError):
            os.killpg(group, number)
    time.sleep(float(sys.argv[1]))
"""
"""Program of a process that ends process groups when its parent is gone, even if it was killed."""


class ServiceError(PeerError):
    """A service did not become ready, or died; the message ends with the tail of its log."""


@dataclass(frozen=True)
class Service:
    """A command that serves HTTP."""

    name: str
    command: Sequence[str]
    ready_url: str
    """URL that answers 200 once the service is ready."""
    log: Path
    """File that takes stdout and stderr."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that are added to our own environment."""
    hidden: Collection[str] = ()
    """Names of our variables that the service does not get."""


class Child:
    """A started service, at the head of a process group of its own.

    It needs a group because vLLM starts further processes that outlive a killed parent. A Ctrl-C then
    reaches the children only through us, once.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.ready = False
        with service.log.open("wb") as log:
            self.process = subprocess.Popen(
                service.command,
                env=_environment(service),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def check(self) -> None:
        """Check that the process runs.

        Raises:
            ServiceError: the process has ended.
        """
        status = self.process.poll()
        if status is not None:
            raise self.error(f"ended with status {status}")

    def probe(self) -> bool:
        """Ask whether the service is ready. Once it was, the result stays True."""
        url = self.service.ready_url
        with suppress(OSError), urllib.request.urlopen(url, timeout=PROBE_SECONDS) as reply:
            self.ready = self.ready or reply.status == 200
        return self.ready

    def error(self, problem: str) -> ServiceError:
        """An error for the caller to raise; its message ends with the tail of the service's log."""
        tail = self.service.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        headline = f"the {self.service.name} {problem}; {self.service.log} ends:"
        return ServiceError("\n".join([headline, *tail]))

    def signal(self, number: signal.Signals) -> bool:
        """Send a signal to the process or to its group; False if no process is left."""
        with suppress(ProcessLookupError):
            if number == signal.SIGTERM and self.process.poll() is None:
                self.process.send_signal(number)  # vLLM ends its own children in order
            else:
                os.killpg(self.process.pid, number)
            return True
        return False

    def gone(self) -> bool:
        """True when no process of the group is left."""
        self.process.poll()  # reap it, or the group would never be empty
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return True
        return False


def _environment(service: Service) -> dict[str, str]:
    environment = {**os.environ, **service.environment}
    for name in service.hidden:
        environment.pop(name, None)
    return environment


@contextmanager
def running(
    services: Sequence[Service],
    *,
    timeout: float,
    watch: Callable[[list[Child]], None] = lambda children: None,
) -> Iterator[list[Child]]:
    """Start all services at once, wait until each is ready, and end them when the block is left.

    Args:
        services: the services to start.
        timeout: longest wait for all of them, in seconds.
        watch: called at every poll while waiting.

    Raises:
        ServiceError: a service ended before it was ready, or was not ready in time.
    """
    children: list[Child] = []
    try:
        for service in services:
            children.append(Child(service))
        with _guarded(children):
            _wait(children, timeout, watch)
            yield children
    finally:
        stop(children)


@contextmanager
def _guarded(children: Sequence[Child]) -> Iterator[None]:
    """A block in which the children's process groups end even if this process is killed."""
    groups = [str(child.process.pid) for child in children]
    command = (sys.executable, "-c", GUARD, str(GRACE_SECONDS), *groups)
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        guard.kill()  # before the ids of its groups can be reused
        guard.communicate()


def _wait(children: list[Child], timeout: float, watch: Callable[[list[Child]], None]) -> None:
    deadline = time.monotonic() + timeout
    while True:
        for child in children:
            child.check()
            if not child.ready:
                child.probe()
        watch(children)
        waiting = [child for child in children if not child.ready]
        if not waiting:
            return
        if time.monotonic() > deadline:
            raise waiting[0].error(f"was not ready after {timeout:.0f} s")
        time.sleep(POLL_SECONDS)


def exit_at_signals() -> None:
    """Turn SIGTERM and SIGHUP (the terminal's end) into `SystemExit`, so that `running` ends the children."""

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # `nohup` has us ignore it
        signal.signal(signal.SIGHUP, leave)


def stop(children: Sequence[Child], grace: float = GRACE_SECONDS) -> None:
    """End all children: SIGTERM, and SIGKILL for what is left of their groups after ``grace`` seconds.

    Killing is not rare: vLLM loses a SIGTERM that reaches it while it starts its engine.
    """
    try:
        for child in children:
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and not all(map(Child.gone, children)):
            time.sleep(POLL_SECONDS / 4)
    finally:  # a second Ctrl-C must not leave anything behind either
        for child in children:
            child.signal(signal.SIGKILL)
            child.process.wait()
