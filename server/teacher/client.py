"""The teacher: a separately hosted vLLM server that continues token ids over HTTP."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from server.completion import Piece
from server.http.tracing import CallSpan
from server.metrics import BREAKER_OPEN, TEACHER_CALL_SECONDS, TEACHER_CALLS
from server.teacher.breaker import Breaker
from server.vllm_api import Logprob, SamplingParams

# Up to this many tokens a span comes as one JSON body: cheaper on both sides than a stream.
STREAM_ABOVE = 8

# So many tokens have `Teacher.span_timeout` to be written, and so many more as long again.
SPAN = 64

# Idle connections are dropped after this many seconds, before the teacher does it (vLLM: 5 s).
KEEP_ALIVE = 4

# Behind its last token a teacher has this long to end its reply, or the connection is not used again.
END_SECONDS = 1.0

# Sampling parameters that vLLM's completions endpoint takes under the same name.
FORWARDED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "logit_bias",
    "allowed_token_ids",
    "stop_token_ids",
    "ignore_eos",
)


# Statuses by which a server says that the request is wrong, not itself.
REFUSALS = (400, 413, 422)


class TeacherError(Exception):
    """A teacher call failed, or was not made; ``reason`` is one of a few words fit for a metric's label.

    unreachable | timeout | status | nonsense; not made: breaker | saturated
    """

    def __init__(self, reason: str, message: str, *, refused: bool = False, well: bool = False) -> None:
        """``well``: this does not speak against the teacher; ``refused``: nor would it take the same call."""
        super().__init__(message)
        self.reason = reason
        self.refused = refused
        self.well = well or refused


class _ClosedConnection(TeacherError):
    """The other side closed a connection that was kept alive, before it answered: try another."""


@dataclass
class _Sending:
    """One request on its way."""

    reused: bool = False
    """On a connection that had another before."""


def _reuse_is_noted() -> aiohttp.TraceConfig:
    """So that a connection that was closed while nobody used it can be told from a server that hangs up."""

    async def reused(_session: aiohttp.ClientSession, context: Any, _: Any) -> None:
        if context.trace_request_ctx is not None:
            context.trace_request_ctx.reused = True

    config = aiohttp.TraceConfig()
    config.on_connection_reuseconn.append(reused)
    return config


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class _Error(msgspec.Struct):
    code: Any = None
    message: str = ""


class _Completion(msgspec.Struct):
    choices: list[_Choice] = []
    error: _Error | None = None
    """What a stream says where a reply would have another status."""


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _Patience:
    """How long a call may still wait: for its next token, for every 64 of them, and in all."""

    def __init__(self, token_seconds: float, span_seconds: float, started: float, deadline: float) -> None:
        self.token_seconds, self._span_seconds = token_seconds, span_seconds
        self._started, self._deadline = started, deadline
        self.written = 0

    def seconds(self) -> float:
        due = self._started + self._span_seconds * (1 + self.written // SPAN)
        return min(self.token_seconds, min(due, self._deadline) - time.monotonic())


class Teacher:
    """Client of one server of the teacher. Tokens go out and come in as ids: nothing is tokenised twice."""

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 10.0,
        span_timeout: float = 20.0,
        breaker: Breaker,
        vocabulary: int,
    ) -> None:
        """``timeout`` is the longest wait for the next token, ``span_timeout`` for 64 of them and for what is
        left of them, both in seconds; ids are < ``vocabulary``.
        """
        self.url = url.rstrip("/")
        self.name = urlsplit(url).netloc.rpartition("@")[2]
        """Host and port: the label of this server's metrics."""
        self.model = model
        self.max_model_len: int | None = None
        self.timeout = timeout
        self.span_timeout = span_timeout
        self.breaker = breaker
        BREAKER_OPEN.labels(self.name).set_function(lambda: breaker.tripped)
        self.vocabulary = vocabulary
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Teacher":
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.timeout),
            trace_configs=[_reuse_is_noted()],
        )
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self._session.close()

    async def connect(self) -> None:
        """Find the served model. Raises TeacherError where there is none, or not the named one."""
        models = await self._json("GET", "/v1/models", _Models)
        names = [model.id for model in models.data]
        wanted = self.model or (names[0] if names else None)
        if wanted not in names:
            served = ", ".join(names) or "no model"
            raise TeacherError("status", f"the teacher at {self.url} serves {served}, not {wanted!r}")
        self.model = wanted
        self.max_model_len = models.data[names.index(wanted)].max_model_len

    async def check_vocabulary(self, texts: Sequence[str], expected: Sequence[list[int]]) -> None:
        """Raises TeacherError where the teacher's tokenizer splits a probe text in another way."""
        for text, ids in zip(texts, expected, strict=True):
            body = {"model": self.model, "prompt": text, "add_special_tokens": False}
            answer = await self._json("POST", "/tokenize", dict, body)
            if answer.get("tokens") != ids:
                raise TeacherError(
                    "nonsense",
                    f"the teacher at {self.url} has another vocabulary than the student: it tokenises "
                    f"{text!r} as {answer.get('tokens')}, the student as {ids}",
                )

    async def healthy(self) -> bool | None:
        """Whether the teacher says that it is well; None where it says nothing within the timeout."""
        try:
            async with asyncio.timeout(self.timeout), self._session.get(f"{self.url}/health") as response:
                return response.status == 200
        except TimeoutError:
            return None
        except aiohttp.ClientError:
            return False

    async def write(
        self,
        prompt_ids: list[int],
        tokens: int,
        params: SamplingParams,
        *,
        min_tokens: int = 0,
        seed: int | None = None,
        request_id: str,
        started: float | None = None,
        deadline: float = math.inf,
    ) -> AsyncIterator[Piece]:
        """Continue ``prompt_ids`` by at most ``tokens`` tokens, in pieces as they arrive.

        The last piece has a finish reason: "length" where the span is full, else the teacher ended
        the completion. A span of up to 8 tokens comes as a whole. Closing the iterator closes the
        connection, by which vLLM aborts the call.
        The time for a span counts from ``started`` (default: now); no piece comes behind the ``deadline``
        (both of `time.monotonic`).

        Raises:
            TeacherError: whatever went wrong; pieces handed out before it stay valid.
        """
        stream = tokens > STREAM_ABOVE
        body = self._body(params) | {
            "prompt": prompt_ids,
            "max_tokens": tokens,
            "min_tokens": min(min_tokens, tokens),
            "seed": seed,
            "stream": stream,
        }
        called, outcome, blamed = time.monotonic(), "aborted", False
        span = CallSpan(self.name, tokens)
        headers = {"X-Request-Id": request_id, **span.headers}
        started = called if started is None else started
        patience = _Patience(self.timeout, self.span_timeout, started, deadline)
        try:
            async with self._request("POST", "/v1/completions", patience, body, headers) as response:
                replies = self._events(response, patience) if stream else self._body_of(response, patience)
                async for payload in replies:
                    piece = self._piece(payload, tokens - patience.written, params)
                    patience.written += len(piece.token_ids)
                    if piece.finish_reason is None:
                        yield piece
                        continue
                    outcome = "ok"
                    patience.token_seconds = min(patience.token_seconds, END_SECONDS)
                    with suppress(TeacherError):  # nothing that is still needed
                        async for _ in replies:  # to the end, so that the connection is reused
                            pass
                    yield piece
                    return
            raise TeacherError("nonsense", "the teacher's stream ended without a finish reason")
        except TeacherError as error:
            outcome, blamed = error.reason, not error.well
            raise
        finally:
            TEACHER_CALLS.labels(self.name, outcome).inc()
            TEACHER_CALL_SECONDS.labels(self.name).observe(time.monotonic() - called)
            span.end(outcome, patience.written)
            if blamed:
                self.breaker.failed()
            elif outcome != "aborted":
                self.breaker.succeeded()

    def _body(self, params: SamplingParams) -> dict[str, Any]:
        body = {name: value for name in FORWARDED if (value := getattr(params, name)) is not None}
        body |= {"model": self.model, "return_token_ids": True, "add_special_tokens": False}
        if params.logprobs is not None:
            body |= {"logprobs": params.logprobs, "return_tokens_as_token_ids": True}
        return body

    def _piece(self, payload: bytes, room: int, params: SamplingParams) -> Piece:
        try:
            reply = msgspec.json.decode(payload, type=_Completion)
            if reply.error is not None and reply.error.code in REFUSALS:
                message = f"the teacher refused in its stream: {reply.error.message[:500]}"
                raise TeacherError("status", message, refused=True)
            (choice,) = reply.choices
        except (msgspec.MsgspecError, ValueError) as error:
            raise TeacherError("nonsense", f"the teacher's reply is not a completion: {error}") from error
        ids = choice.token_ids or []
        if len(ids) > room or any(token_id < 0 for token_id in ids):
            raise TeacherError("nonsense", f"the teacher wrote token ids {ids} where {room} were asked for")
        if ids and max(ids) >= self.vocabulary:
            # A high temperature reaches padded rows: a client must not open the breaker for all with that.
            message = f"the teacher wrote the token id {max(ids)}, which the student does not have"
            raise TeacherError("nonsense", message, well=True)
        if not ids and choice.finish_reason == "length":
            raise TeacherError("nonsense", "the teacher wrote nothing and did not end the completion")
        if choice.finish_reason not in (None, "stop", "length"):
            raise TeacherError("nonsense", f"the teacher finished with {choice.finish_reason!r}")
        logprobs = None
        if params.logprobs is not None and ids:
            logprobs = _logprobs(ids, choice.logprobs, self.vocabulary)
        return Piece(ids, logprobs, choice.finish_reason, choice.stop_reason)

    async def _json(self, method: str, path: str, type_: Any, body: dict[str, Any] | None = None) -> Any:
        patience = _Patience(self.timeout, self.span_timeout, time.monotonic(), math.inf)
        async with self._request(method, path, patience, body) as response:
            async for payload in self._body_of(response, patience):
                try:
                    return msgspec.json.decode(payload, type=type_)
                except msgspec.MsgspecError as error:
                    raise TeacherError("nonsense", f"{self.url}{path}: {error}") from error

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        path: str,
        patience: _Patience,
        body: dict[str, Any] | None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        response, fresh = None, 0
        while response is None:
            sending = _Sending()
            request = self._session.request(
                method, self.url + path, json=body, headers=headers, trace_request_ctx=sending
            )
            try:
                response = await self._wait(request, patience)
            except _ClosedConnection:
                # All that were kept may be closed by now; of new ones a second is tried.
                fresh += not sending.reused
                if fresh > 1:
                    raise
        try:
            if response.status != 200:
                detail = (await self._wait(response.text(), patience))[:500]
                message = f"{self.url}{path} answered {response.status}: {detail}"
                raise TeacherError("status", message, refused=response.status in REFUSALS)
            yield response
        finally:
            # Read to the end, the connection goes back to the pool; cut short, this closes it.
            response.release() if response.content.at_eof() else response.close()

    async def _body_of(self, response: aiohttp.ClientResponse, patience: _Patience) -> AsyncIterator[bytes]:
        yield await self._wait(response.read(), patience)

    async def _events(self, response: aiohttp.ClientResponse, patience: _Patience) -> AsyncIterator[bytes]:
        """Data of server-sent events, up to the last."""
        while line := await self._wait(response.content.readline(), patience):
            if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                yield line[len(b"data: ") :]

    async def _wait(self, awaitable: Any, patience: _Patience) -> Any:
        seconds = patience.seconds()
        try:
            return await asyncio.wait_for(awaitable, seconds)
        except TimeoutError as error:
            raise TeacherError("timeout", f"nothing from {self.url} for {max(0.0, seconds):.1f} s") from error
        except aiohttp.ClientConnectorError as error:
            raise TeacherError("unreachable", f"cannot reach the teacher at {self.url}: {error}") from error
        except aiohttp.ClientConnectionError as error:
            raise _ClosedConnection("unreachable", f"the teacher at {self.url} hung up: {error}") from error
        except (aiohttp.ClientError, ValueError) as error:
            raise TeacherError("unreachable", f"cannot read the teacher at {self.url}: {error}") from error


def _logprobs(ids: list[int], reply: _Logprobs | None, vocabulary: int) -> list[dict[int, Logprob]]:
    """vLLM's per-token dictionaries from the reply's lists; keys come as ``token_id:17``.

    A teacher may have rows beyond the common ``vocabulary``: they are left out, as the student's are.
    """
    tops = reply and (reply.top_logprobs or [None] * len(ids))
    if reply is None or not len(reply.token_logprobs) == len(tops) == len(ids):
        raise TeacherError("nonsense", "the teacher's log-probabilities do not match its tokens")
    result = []
    for token_id, chosen, top in zip(ids, reply.token_logprobs, tops, strict=True):
        try:
            by_id = {int(token.removeprefix("token_id:")): value for token, value in (top or {}).items()}
        except ValueError as error:
            raise TeacherError("nonsense", f"the teacher's log-probabilities have no ids: {error}") from error
        if chosen is None:
            raise TeacherError("nonsense", "the teacher's log-probabilities lack a written token")
        visible = (item for item in by_id.items() if item[0] < vocabulary)
        ranked = sorted(visible, key=lambda item: -item[1])
        logprobs = {i: Logprob(value, rank=rank) for rank, (i, value) in enumerate(ranked, start=1)}
        # As vLLM does: the written token first, then the best ones in order.
        result.append({token_id: logprobs.pop(token_id, Logprob(chosen))} | logprobs)
    return result
