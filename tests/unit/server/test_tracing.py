"""Spans of requests and teacher calls, in OpenTelemetry's own memory exporter."""

from typing import Any

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server.exchange import EXCHANGE, Exchange
from server.http.tracing import Traces
from server.tracing import CallSpan

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """The exporter, set once for the whole process, as OpenTelemetry allows no second time."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> InMemorySpanExporter:
    exporter.clear()
    return exporter


async def app(scope: Any, receive: Any, send: Any) -> None:
    """An app with a call of 4 tokens and one that fails; answers with the traceparents it got and sends."""
    exchange = Exchange()
    report = exchange.open()
    report.completion_tokens, report.tokens, report.calls = 9, 4, 2
    EXCHANGE.set(exchange)
    call = CallSpan("teacher:8000", 4)
    seen = [value.decode() for name, value in scope["headers"] if name == b"traceparent"]
    body = " ".join([*seen, call.headers.get("traceparent", "none")]).encode()
    call.end("ok", 4)
    CallSpan("teacher:8000", 4).end("timeout", 0)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def ask(path: str = "/v1/completions", **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(Traces(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        return await client.post(path, headers=headers)


def traceparent(span: Any) -> str:
    return f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-{span.context.trace_flags:02x}"


async def test_calls_are_children_of_their_requests_span(spans: InMemorySpanExporter) -> None:
    reply = await ask()
    call, failed, request = spans.get_finished_spans()
    assert request.name == "POST /v1/completions"
    assert request.kind == trace.SpanKind.SERVER
    assert request.parent is None
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["wheels.completion_tokens"] == 9
    assert request.attributes["wheels.teacher.tokens"] == 4
    assert request.attributes["wheels.teacher.calls"] == 2
    assert call.parent.span_id == failed.parent.span_id == request.context.span_id
    assert call.kind == trace.SpanKind.CLIENT
    assert call.attributes["server.address"] == "teacher:8000"
    assert call.attributes["wheels.tokens.written"] == 4
    assert call.status.is_ok
    assert failed.attributes["wheels.outcome"] == failed.status.description == "timeout"
    # vLLM's spans have the request's span as parent, the teacher's have the call's.
    assert reply.text == f"{traceparent(request)} {traceparent(call)}"


async def test_a_clients_trace_goes_on(spans: InMemorySpanExporter) -> None:
    reply = await ask(traceparent=PARENT)
    request = spans.get_finished_spans()[-1]
    assert trace.format_trace_id(request.context.trace_id) in PARENT
    assert trace.format_span_id(request.parent.span_id) in PARENT
    assert reply.text.split()[0] == traceparent(request)


async def test_a_request_that_writes_nothing_has_no_span(spans: InMemorySpanExporter) -> None:
    await ask("/tokenize")
    assert not [span for span in spans.get_finished_spans() if span.kind == trace.SpanKind.SERVER]
