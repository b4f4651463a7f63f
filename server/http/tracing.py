"""OpenTelemetry: a span for every request, with a span for each segment of the student and each teacher call.

Tracing is off until an exporter is set by vLLM's ``--otlp-traces-endpoint``. The student's spans are vLLM's
own (``llm_request``, one for each segment). The spans of a teacher that traces too are below the gateway's
calls. No span holds text or token ids.
"""

from opentelemetry import propagate
from opentelemetry.trace import SpanKind, Status, StatusCode

from server.exchange import EXCHANGE
from server.http.asgi import REQUEST_ID, App, Message, Receive, Send, encoded, route_path
from server.http.fields import PATHS
from server.tracing import TRACER


class Traces:
    """ASGI middleware: a span around every request that writes, below its client's span if it names one."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Trace the request."""
        path = route_path(scope) if scope["type"] == "http" else None
        if path not in PATHS or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        sent = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        attributes = {
            "http.request.method": "POST",
            "url.path": path,
            "wheels.request_id": REQUEST_ID.get() or "",
        }
        with TRACER.start_as_current_span(
            f"POST {path}", propagate.extract(sent), SpanKind.SERVER, attributes
        ) as span:
            if not span.is_recording():
                return await self.app(scope, receive, send)
            carrier: dict[str, str] = {}
            propagate.inject(carrier)  # vLLM takes a segment's parent from the request's headers
            headers = [pair for pair in scope["headers"] if pair[0].decode("latin-1") not in carrier]

            async def observe(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        span.set_status(Status(StatusCode.ERROR))
                await send(message)

            try:
                await self.app({**scope, "headers": [*headers, *encoded(carrier)]}, receive, observe)
            finally:
                if exchange := EXCHANGE.get(None):
                    report = exchange.total()
                    span.set_attributes(
                        {
                            "wheels.completion_tokens": report.completion_tokens,
                            "wheels.teacher.tokens": report.tokens,
                            "wheels.teacher.calls": report.calls,
                            "wheels.degraded": report.degraded,
                        }
                    )
