"""Error responses, in the shape of the API that was called."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from router.errors import BadRequest
from server.http.asgi import REQUEST_ID, Message, Send, encoded, route_path

ANTHROPIC = "/v1/messages"
RESPONSES = "/v1/responses"
# Names of errors by status: vLLM's own names, and those of Anthropic's API.
OPENAI_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    500: "InternalServerError",
    501: "NotImplementedError",
    502: "Bad Gateway",
    503: "ServiceUnavailableError",
}
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


@dataclass(frozen=True)
class ApiError:
    """An error that can be rendered for every API of the gateway."""

    status: int
    message: str
    param: str | None = None
    """The parameter that is wrong, as the client sent it."""

    @classmethod
    def of(cls, error: Exception) -> "ApiError":
        """The client's error for an exception; vLLM decides for exceptions that are not the gateway's own."""
        if isinstance(error, BadRequest):
            return cls(error.http_status, str(error), error.param)
        from server.vllm_api import error_info  # loads vLLM, which raised it

        info = error_info(error)
        return cls(info.code, info.message, info.param)

    def document(self, path: str) -> dict[str, Any]:
        """The body of a response of the API at ``path``."""
        if speaks_anthropic(path):
            error = {"type": self._anthropic_type, "message": self.message}
            return {"type": "error", "error": error, "request_id": REQUEST_ID.get()}
        return {"error": self._openai_fields}

    def event(self, path: str, sequence_number: int = 0) -> bytes:
        """The last event of a stream of the API at ``path``."""
        if speaks_anthropic(path):
            return _event("error", self.document(path))
        if path == RESPONSES:
            # The API's event has the fields at its top; OpenAI's clients raise if there is an `error`.
            fields = {"code": str(self.status), "message": self.message, "param": self.param}
            numbered = {"type": "error", "sequence_number": sequence_number, **fields}
            return _event("error", numbered | {"error": self._openai_fields})
        return _event(None, self.document(path)) + b"data: [DONE]\n\n"

    @property
    def _openai_fields(self) -> dict[str, Any]:
        type_ = OPENAI_TYPES.get(self.status, "InternalServerError")
        return {"message": self.message, "type": type_, "param": self.param, "code": self.status}

    @property
    def _anthropic_type(self) -> str:
        other = "invalid_request_error" if self.status < 500 else "api_error"
        return ANTHROPIC_TYPES.get(self.status, other)


def speaks_anthropic(path: str) -> bool:
    """Whether the API at ``path`` is Anthropic's."""
    return path == ANTHROPIC or path.startswith(f"{ANTHROPIC}/")


async def refuse(
    scope: Message, send: Send, error: ApiError, headers: Mapping[str, str] | None = None
) -> None:
    """Answer the request with an error and nothing else."""
    body = json.dumps(error.document(route_path(scope))).encode()
    start = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    await send({"type": "http.response.start", "status": error.status, "headers": encoded(start)})
    await send({"type": "http.response.body", "body": body})


def _event(name: str | None, document: dict[str, Any]) -> bytes:
    named = b"" if name is None else f"event: {name}\n".encode()
    return named + b"data: " + json.dumps(document).encode() + b"\n\n"
