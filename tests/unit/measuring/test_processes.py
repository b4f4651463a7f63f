"""Child processes: ready or explained, and always ended."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from measuring.pair import free_port
from measuring.processes import Child, Service, ServiceError, running, stop
from tests.helpers.paths import ROOT

ANSWER = (
    "import sys\n"
    "from http.server import HTTPServer, SimpleHTTPRequestHandler\n"
    "HTTPServer(('127.0.0.1', int(sys.argv[1])), SimpleHTTPRequestHandler).serve_forever()"
)
STUBBORN = (
    "import signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print(child.pid, flush=True)\n"
    "time.sleep(600)"
)


def service(tmp_path: Path, program: str, name: str = "service") -> Service:
    port = free_port()
    command = (sys.executable, "-c", program, str(port))
    return Service(name, command, f"http://127.0.0.1:{port}/", tmp_path / f"{name}.log")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_services_are_yielded_when_ready_and_ended_after_the_block(tmp_path: Path) -> None:
    seen: list[list[bool]] = []
    services = [service(tmp_path, ANSWER, name) for name in ("one", "two")]
    with running(
        services, timeout=100, watch=lambda c: seen.append([child.ready for child in c])
    ) as children:
        assert [child.ready for child in children] == [True, True]
        assert all(alive(child.process.pid) for child in children)
    assert seen[-1] == [True, True]
    assert not any(alive(child.process.pid) for child in children)


def test_a_service_that_ends_early_is_explained_by_its_log(tmp_path: Path) -> None:
    services = (
        service(tmp_path, ANSWER, "gateway"),
        service(tmp_path, "raise SystemExit('no such model')", "teacher"),
    )
    explained = pytest.raises(ServiceError, match=r"the teacher ended with status 1(.|\n)*no such model")
    with explained, running(services, timeout=100):
        pytest.fail("never ready")


def test_a_service_that_is_never_ready_is_an_error_with_its_log(tmp_path: Path) -> None:
    slow = service(tmp_path, "import time; print('loading', flush=True); time.sleep(600)")

    def until_it_has_begun(children: list[Child]) -> None:
        while not slow.log.read_text().endswith("\n"):
            children[0].check()
            time.sleep(0.02)

    with (
        pytest.raises(ServiceError, match=r"was not ready after 1 s(.|\n)*loading"),
        running([slow], timeout=1, watch=until_it_has_begun),
    ):
        pytest.fail("never ready")


def test_an_exception_inside_ends_the_children_too(tmp_path: Path) -> None:
    with pytest.raises(KeyError), running([service(tmp_path, ANSWER)], timeout=100) as (child,):
        raise KeyError
    assert not alive(child.process.pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_the_children_too(tmp_path: Path, number: signal.Signals) -> None:
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from measuring.processes import Service, exit_at_signals, running\n"
        f"answers = Service('service', (sys.executable, '-c', {ANSWER!r}, sys.argv[1]),"
        " f'http://127.0.0.1:{sys.argv[1]}/', Path(sys.argv[2]) / 'log')\n"
        "exit_at_signals()\n"
        "with running([answers], timeout=100) as (child,):\n"
        "    print(child.process.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, str(free_port()), str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.send_signal(number)
        parent.wait(100)
    deadline = time.monotonic() + (60 if number == signal.SIGKILL else 0)
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(child)


def test_a_service_that_ignores_sigterm_is_killed_with_its_own_children(tmp_path: Path) -> None:
    child = Child(service(tmp_path, STUBBORN))
    while not (line := child.service.log.read_text()).endswith("\n"):
        time.sleep(0.02)
    grandchild = int(line)
    assert alive(grandchild)
    stop([child], grace=0.3)
    assert child.process.returncode == -9
    deadline = time.monotonic() + 60
    while alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(grandchild)


def test_the_environment_is_added_to_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "1")
    program = "import os; print(os.environ['OURS'] + os.environ['THEIRS'])"
    base = service(tmp_path, program)
    child = Child(Service(base.name, base.command, base.ready_url, base.log, {"THEIRS": "2"}))
    assert child.process.wait(100) == 0
    assert base.log.read_text() == "12\n"
    assert "THEIRS" not in os.environ


def test_a_hidden_variable_does_not_reach_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OURS", "1")
    base = service(tmp_path, "import os; print(os.environ.get('OURS'))")
    child = Child(replace(base, hidden=("OURS", "NOBODYS")))
    assert child.process.wait(100) == 0
    assert base.log.read_text() == "None\n"


def test_a_free_port_is_the_preferred_one_when_it_is_free() -> None:
    port = free_port()
    assert free_port(preferred=port) == port


def test_no_outgoing_connection_takes_a_free_port_before_its_server_does() -> None:
    """The kernel takes the ports of outgoing connections from this range."""
    lowest, highest = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = [free_port() for _ in range(50)]
    assert not any(lowest <= port <= highest for port in ports)
    assert len(set(ports)) > 40
