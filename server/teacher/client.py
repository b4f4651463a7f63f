"""The teacher: a separately hosted vLLM server that continues token ids over HTTP."""

import asyncio
import logging
import math
import sys
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

import msgspec

from router.address import base_url
from server.completion import Piece
from server.metrics import BREAKER_OPEN, TEACHER_CALL_SECONDS, TEACHER_CALLS
from server.teacher.adapters import Adapters
from server.teacher.ask import Ask, AskProgress
from server.teacher.body import GENERATE, post
from server.teacher.breaker import Breaker
from server.teacher.carried import Screen
from server.teacher.connection import LONGEST, Connection
from server.teacher.constrained import constrained
from server.teacher.errors import TeacherError
from server.teacher.meter import Meter
from server.teacher.patience import Patience
from server.teacher.replies import Reply, read_reply, read_usage
from server.tracing import CallSpan

logger = logging.getLogger(__name__)

PROBE_SECONDS = 2.0
"""Longest wait for a health check, in seconds; ``teacher_timeout`` if that is less."""

ECHOED = 16
"""Bytes of one token id of the prompt, which vLLM echoes in the first line of a stream."""

REPORTED = 64
"""Bytes of one log-probability in a reply, if all of a token's are wanted."""

REFUSED_IN_A_ROW = 8
"""A span ends when the teacher draws an id that cannot stay this many times in a row."""

UNREAD = ("unreachable", "status")
"""Failures after which the teacher has not read the prompt, unless it has begun to write."""


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


def _screened(reply: Reply, screen: Screen, progress: AskProgress) -> Reply:
    """The part of a reply that can stay, with the ending that the whole ask has there."""
    ask = progress.ask
    screened = screen.apply(reply.piece, progress.tail(screen.reach))
    piece, again, banned = screened if ask.constraint is None else constrained(screened, ask.constraint)
    full = len(piece.token_ids) >= progress.tokens_left
    if again and full:
        return Reply(replace(piece, finish_reason="length"))
    if progress.banned and piece.token_ids and piece.finish_reason == "length" and not full:
        return Reply(replace(piece, finish_reason=None), again=True)
    if ask.end_ids and piece.stop_reason == ask.end_ids[0]:
        piece.stop_reason = None  # as if the student had ended by itself
    padded = None if again else reply.padded
    return Reply(piece, again=again or padded is not None, padded=padded, banned=banned)


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
        of: str = "",
    ) -> None:
        """Describe the server; entering the client opens it.

        Args:
            url: base URL, without /v1; a user and a password in it are sent as basic authentication.
            model: the model name that it must serve; None for its first one.
            api_key: API key that is sent as a bearer token.
            timeout: longest wait for the next token, in seconds; longer for the first after a long prompt.
            span_timeout: longest wait for 64 tokens, or for the last ones of a span, in seconds.
            breaker: the circuit breaker that counts its failures.
            vocabulary: the student's token ids are below this.
            of: the teacher's name in metrics; empty for an only teacher.

        Raises:
            TeacherError: the URL has a password, and there is an API key too.
        """
        self._connection = Connection(base_url(url), api_key=api_key, connect_timeout=timeout)
        self.model = model
        self.adapters = Adapters()
        self.max_model_len: int | None = None
        self.generates = False
        """Whether the server has `GENERATE`, which is much cheaper for it after a long prompt."""
        self.timeout = timeout
        self.span_timeout = span_timeout
        self.breaker = breaker
        self.of = of
        BREAKER_OPEN.labels(of, self.name).set_function(lambda: breaker.tripped)
        self.vocabulary = vocabulary
        self._served_at = -math.inf
        self._told_of_cache = False

    async def __aenter__(self) -> "Teacher":
        await self._connection.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._connection.__aexit__(*error)

    @property
    def name(self) -> str:
        """Host and port: this server's name in metrics, logs and traces."""
        return self._connection.name

    @property
    def url(self) -> str:
        """Base URL without credentials."""
        return self._connection.url

    def _patience(self) -> Patience:
        """The patience with a question that is no completion."""
        return Patience(self.timeout, self.span_timeout)

    async def connect(self) -> None:
        """Find the served model, its context and its endpoints.

        Raises:
            TeacherError: the server does not answer, or does not serve the named model.
        """
        models = await self._connection.decoded("GET", "/v1/models", _Models, self._patience())
        names = [model.id for model in models.data]
        self.adapters.served(names)
        wanted = self.model or (names[0] if names else None)
        if wanted not in names:
            served = ", ".join(names) or "no model"
            raise TeacherError("status", f"the teacher at {self.name} serves {served}, not {wanted!r}")
        self.model = wanted
        self.max_model_len = models.data[names.index(wanted)].max_model_len
        self.generates = await self._takes_token_ids()

    async def _takes_token_ids(self) -> bool:
        """Whether the server has `GENERATE`: it then reports that an empty request has no token ids."""
        try:
            async with self._connection.request("POST", GENERATE, self._patience(), {}):
                return False  # an endpoint of this name, but not vLLM's
        except TeacherError as error:
            return error.refused and "token_ids" in str(error)

    async def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The reply to a question that is no completion, such as one to ``/tokenize``.

        Raises:
            TeacherError: there is no useful reply.
        """
        question = {"model": self.model, **body}
        reply: dict[str, Any] = await self._connection.decoded("POST", path, dict, self._patience(), question)
        return reply

    async def healthy(self) -> bool | None:
        """Whether the health check succeeds; None if neither it nor any call was answered in time."""
        asked = time.monotonic()
        try:
            async with asyncio.timeout(min(PROBE_SECONDS, self.timeout)):
                healthy = await self._connection.status("/health") == 200
                if healthy and self.adapters.missed:
                    await self._look_for_adapters()
                return healthy
        except TimeoutError:
            return True if self._served_at > asked else None

    async def _look_for_adapters(self) -> None:
        """Ask again for the teacher's adapters, because a missing one was asked for."""
        with suppress(TeacherError):  # the next probe asks again
            models = await self._connection.decoded("GET", "/v1/models", _Models, self._patience())
            self.adapters.served([model.id for model in models.data])

    def first_wait(self, prompt_tokens: int) -> float:
        """Longest wait for the first token after a prompt of this length, in seconds."""
        return Patience(self.timeout, self.span_timeout, prompt_tokens=prompt_tokens).seconds

    async def write(
        self,
        ask: Ask,
        *,
        request_id: str,
        started: float | None = None,
        deadline: float = math.inf,
    ) -> AsyncGenerator[Piece]:
        """Continue the ask's prompt, in pieces as they arrive.

        The last piece has a finish reason: "length" if the span is full, else the teacher ended the
        completion. A span of up to 8 tokens comes as a whole. Closing the iterator closes the connection,
        and vLLM then aborts the call. Ids that the student does not have are dropped, and the teacher is
        asked again from there.

        Args:
            ask: the request to the teacher.
            request_id: id of the call in the teacher's log.
            started: start of the span, in seconds of `time.monotonic`; None for now.
            deadline: time after which no piece comes, in seconds of `time.monotonic`.

        Raises:
            TeacherError: the call failed; pieces handed out before stay valid.
        """
        read = len(ask.prompt_ids)
        patience = Patience(
            self.timeout, self.span_timeout, prompt_tokens=read, started=started, deadline=deadline
        )
        called = time.monotonic()
        outcome = "aborted"
        blamed = False
        span = CallSpan(self.name, ask.tokens, self.of)
        headers = {"X-Request-Id": request_id, **span.headers}
        try:
            async with aclosing(self._pieces(ask, headers, patience)) as pieces:
                async for piece in pieces:
                    if piece.finish_reason is not None or ask.as_text:
                        outcome = "ok"
                    yield piece
        except Exception as error:
            problem = await self._judged(error, patience)
            outcome = problem.reason
            blamed = not problem.well
            ask.meter.failed(reached=problem.reason not in UNREAD)
            raise problem from error.__cause__
        finally:
            self._count(outcome, time.monotonic() - called)
            span.end(outcome, patience.written)
            if blamed:
                self.breaker.failed()

    def _count(self, outcome: str, seconds: float) -> None:
        TEACHER_CALLS.labels(self.of, self.name, outcome).inc()
        TEACHER_CALL_SECONDS.labels(self.of, self.name).observe(seconds)
        if outcome == "ok":
            self.breaker.succeeded()

    async def _judged(self, error: Exception, patience: Patience) -> TeacherError:
        """The failure with its reason, and whether it is a fault of the teacher.

        A teacher that makes a call wait is busy, not broken, if it serves other calls or its health check
        succeeds. So its queue, or one long prompt, does not stop all other calls.
        """
        if not isinstance(error, TeacherError):
            logger.error(
                "a call to the teacher at %s ended with an error in the gateway", self.name, exc_info=error
            )
            return TeacherError("nonsense", f"{type(error).__name__} in a call of {self.name}")
        if error.reason != "timeout":
            return error
        waited = time.monotonic() - patience.last_token
        lately = self._served_at > patience.last_token + waited / 2
        well = lately or await self.healthy() is True
        queued = well and not patience.written and self._served_at > patience.last_token
        return TeacherError("saturated" if queued else "timeout", str(error), well=well)

    async def _pieces(
        self, ask: Ask, headers: Mapping[str, str], patience: Patience
    ) -> AsyncGenerator[Piece]:
        """The pieces of an ask, from one HTTP request or from several."""
        progress = AskProgress(ask)
        while not progress.ended:
            allowed = progress.allowed()
            stuck = progress.refused_in_a_row >= REFUSED_IN_A_ROW
            if ask.constraint is not None and (stuck or allowed == []):
                yield Piece([], finish_reason="length")  # the teacher wants what the grammar refuses
                return
            if stuck:
                ids = sorted(progress.padded | progress.banned)
                wrote = f"the teacher at {self.name} wrote the token ids {ids}"
                raise TeacherError("nonsense", f"{wrote}, which the request does not allow", well=True)
            async with aclosing(self._turn(progress, allowed, headers, patience)) as pieces:
                async for piece in pieces:
                    yield piece
            left = progress.tokens_left
            if not progress.ended and not ask.meter.admits(len(ask.prompt_ids) + len(progress.written), left):
                yield Piece([], finish_reason="length")
                return

    async def _turn(
        self,
        progress: AskProgress,
        allowed: Sequence[int] | None,
        headers: Mapping[str, str],
        patience: Patience,
    ) -> AsyncGenerator[Piece]:
        """The pieces from one HTTP request."""
        try:
            async with aclosing(self._replies(progress, allowed, headers, patience)) as replies:
                async for reply in replies:
                    progress.take(reply)
                    if reply.piece.token_ids:
                        self._served_at = time.monotonic()
                    if reply.piece.token_ids or not reply.again:
                        yield reply.piece
        except TeacherError as error:
            if error.status == 404 and self.adapters.lost(progress.ask.adapter):
                progress.ask.meter.failed(reached=False)
            elif error.status in (403, 404) and self.generates:  # the server was restarted without it
                self.generates = False
                progress.ask.meter.failed(reached=False)
            elif error.refused and progress.grammar:
                progress.takes_grammar = False
            else:
                raise  # otherwise the teacher is asked again, without it

    async def _replies(
        self,
        progress: AskProgress,
        allowed: Sequence[int] | None,
        headers: Mapping[str, str],
        patience: Patience,
    ) -> AsyncGenerator[Reply]:
        """The replies to one request, up to an ending or to a point from which the teacher is asked again."""
        ask = progress.ask
        screen = Screen() if ask.as_text else Screen.of(ask.params, progress.completion)
        model = self.adapters.model_for(ask.adapter, self.model)
        request = post(progress, screen, model, allowed, generates=self.generates)
        reads = len(ask.prompt_ids) + len(progress.written)
        longest = LONGEST + ECHOED * reads
        room = request.tokens
        if ask.reports_all:
            longest += REPORTED * self.vocabulary * room
        ask.meter.begin(reads, room)
        async with self._connection.request(
            "POST", request.path, patience, request.body, headers
        ) as response:
            payloads = self._connection.payloads(response, patience, longest, stream=ask.streamed)
            async with aclosing(payloads):
                async for payload in payloads:
                    vocabulary = sys.maxsize if ask.as_text else self.vocabulary
                    reply = read_reply(payload, room=room, params=ask.params, vocabulary=vocabulary)
                    tokens = len(reply.piece.token_ids)
                    ask.meter.wrote(reply.received)
                    if not ask.streamed:
                        self._note_usage(ask.meter, payload)
                    room -= tokens
                    patience.came(tokens)
                    complete = reply.piece.finish_reason is not None
                    reply = _screened(reply, screen, progress)
                    if complete:
                        with suppress(TeacherError), patience.ending():  # nothing of it is needed
                            async for payload in payloads:  # to the end, so that the connection is reused
                                self._note_usage(ask.meter, payload)
                    elif reply.again and ask.streamed:
                        ask.meter.failed(reached=True)
                    yield reply
                    if complete or reply.again:
                        return
        raise TeacherError("nonsense", f"the reply of {self.name} ended without a finish reason")

    def _note_usage(self, meter: Meter, payload: bytes) -> None:
        """Give the meter the usage that the teacher reports at the end of a request."""
        counted = None if meter.prices is None else read_usage(payload)
        if counted is None:
            return
        meter.report(counted.cached or 0, counted.written)
        if counted.cached is None and not self._told_of_cache:
            self._told_of_cache = True
            logger.warning(
                "the teacher at %s does not report cached tokens, so every token it reads counts in full "
                "(vLLM reports it with --enable-prompt-tokens-details)",
                self.name,
            )
