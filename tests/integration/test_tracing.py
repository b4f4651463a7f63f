"""One trace of a request: our span, vLLM's own spans of the student's segments, our teacher calls."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from measuring.pair import START_SECONDS, Pair, Serving, free_port, gateway_service
from measuring.processes import running
from tests.helpers.client import chat, openai_client


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """An OTLP collector: its address, and the spans that it got."""
    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = ExportTraceServiceRequest.FromString(
                self.rfile.read(int(self.headers["Content-Length"]))
            )
            for resource in request.resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
    server.shutdown()
    server.server_close()


async def test_a_request_is_one_trace(
    stack: Serving,
    pair: Pair,
    sources: list[str],
    tmp_path: Path,
    collector: tuple[str, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    endpoint, spans = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    config = tmp_path / "gateway.yaml"
    config.write_text(f"vllm: {{otlp-traces-endpoint: '{endpoint}'}}")
    url = f"http://127.0.0.1:{free_port()}"
    service = gateway_service(pair, stack.teacher, url, tmp_path, ("--config", str(config)))
    with running([service], timeout=START_SECONDS):
        async with openai_client(url) as client:
            headers = {"X-Request-Id": "order-7"}
            reply = await chat(client, sources[1], 0.5, extra_headers=headers)
    # The gateway has ended, so all of its spans are exported.
    (request,) = [span for span in spans if span.name == "POST /v1/chat/completions"]
    attributes = {a.key: a.value.string_value or a.value.int_value for a in request.attributes}
    assert attributes["wheels.request_id"] == "order-7"
    assert attributes["wheels.teacher.tokens"] == reply.teacher["tokens"]
    children = [span.name for span in spans if span.parent_span_id == request.span_id]
    assert children.count("teacher call") == reply.teacher["calls"] > 0
    assert children.count("llm_request") >= reply.teacher["calls"]
