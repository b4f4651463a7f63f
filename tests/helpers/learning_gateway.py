"""A gateway without engines that learns its prices with the real calibration, policy and bucket."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

from server.http.prices import view
from tests.helpers.scored_traffic import ScoredTraffic


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # clients connect all at once


class LearningGateway:
    """A gateway that answers with completions of `ScoredTraffic`."""

    def __init__(self, *, learned: bool = True, teacher: Mapping[str, Any] | None = None) -> None:
        self.traffic = ScoredTraffic("entropy", scale=3.0, after_teacher=1.0)
        self.budgets: list[float] = []
        """Budget of every completion, in order."""
        self.watch: Callable[[], None] = lambda: None
        """Called at every completion."""
        self._learned = learned
        self._teacher = teacher or {}
        """Further fields of a completion's report."""
        self._lock = Lock()

    def answer(self, path: str, body: bytes) -> Any:
        if path == "/prices":
            self.traffic.show_scores()
            return {**view(self.traffic.calibration, None), "learned": self._learned}
        if path == "/v1/models":
            return {"data": [{"id": "wheels"}]}
        with self._lock:
            return self._completion(json.loads(body)["teacher_budget"])

    def _completion(self, budget: float) -> dict[str, Any]:
        self.budgets.append(budget)
        self.watch()
        teacher, tokens = self.traffic.complete(budget)
        self.traffic.calibration.observe(budget, teacher, tokens)
        report = {"spans": [[0, teacher]], "tokens": teacher, "calls": teacher, "degraded": False}
        choice = {"message": {"content": "…"}, "token_ids": [7] * tokens}
        return {"choices": [choice], "usage": {"prompt_tokens": 4}, "teacher": {**report, **self._teacher}}

    @contextmanager
    def served(self) -> Iterator[str]:
        """Serve from a thread of this process; yields the URL."""
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                content = json.dumps(gateway.answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        with _Server(("127.0.0.1", 0), Handler) as server:
            thread = Thread(target=server.serve_forever)
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_port}"
            finally:
                server.shutdown()
                thread.join()
