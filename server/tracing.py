"""OpenTelemetry: the tracer of the gateway, and the span around a teacher call.

Tracing is off until an exporter is set by vLLM's ``--otlp-traces-endpoint``. No span holds text or token ids.
"""

from opentelemetry import propagate, trace
from opentelemetry.trace import SpanKind, Status, StatusCode

TRACER = trace.get_tracer("training-wheels")


class CallSpan:
    """The span of one teacher call, below the span of the current request."""

    def __init__(self, replica: str, tokens: int, teacher: str = "") -> None:
        attributes: dict[str, str | int] = {"server.address": replica, "wheels.tokens.asked": tokens}
        if teacher:
            attributes["wheels.teacher"] = teacher
        self._span = TRACER.start_span("teacher call", kind=SpanKind.CLIENT, attributes=attributes)
        self.headers: dict[str, str] = {}
        """Headers that make the teacher's own spans, if it has any, part of the trace."""
        if self._span.is_recording():
            propagate.inject(self.headers, trace.set_span_in_context(self._span))

    def end(self, outcome: str, tokens: int) -> None:
        """End the span.

        Args:
            outcome: the outcome of the call, as in wheels_teacher_calls_total.
            tokens: number of tokens that the teacher wrote.
        """
        self._span.set_attributes({"wheels.outcome": outcome, "wheels.tokens.written": tokens})
        if outcome not in ("ok", "aborted"):
            self._span.set_status(Status(StatusCode.ERROR, outcome))
        self._span.end()
