"""A redis-server that the tests start for themselves."""

import shutil
import socket
import subprocess
import time
from pathlib import Path

from measuring.pair import free_port


class RedisServer:
    """redis-server on a free port; ``durable``: every write is on disk before it is answered."""

    def __init__(self, directory: Path, *options: str, durable: bool = False) -> None:
        self.port = free_port()
        assert shutil.which("redis-server"), "these tests start a redis-server (Debian: redis-server)"
        self.url = f"redis://127.0.0.1:{self.port}"
        self._command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self._command += ["--dir", str(directory), *options]
        if durable:
            self._command += ["--appendonly", "yes", "--appendfsync", "always"]
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while not self._answers():
            assert self.process.poll() is None, "redis-server did not start"
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64) == b"+PONG\r\n"
        except OSError:
            return False

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def command(self, *words: str) -> str:
        """The answer of redis-cli to a command."""
        command = ["redis-cli", "-p", str(self.port), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
