"""A tool as a teacher: an HTTP endpoint that reads the text so far, and may return the text that follows."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import msgspec

from server.choice import Choice
from server.completion import Piece
from server.original_prompt import OriginalPrompt
from server.teacher.ask import Ask
from server.teacher.breaker import Breaker
from server.teacher.client import PROBE_SECONDS, Teacher
from server.teacher.completion_text import CompletionText
from server.teacher.connection import LONGEST
from server.teacher.delivery import Delivery
from server.teacher.errors import TeacherError
from server.teacher.meter import Meter
from server.teacher.patience import Patience
from server.teacher.pool import Slot, TeacherPool
from server.teacher.rules import allowed_ids
from server.teacher.teachers import NamedTeacher
from server.teacher.translation import of_one_vocabulary
from server.teacher.words import StudentWords
from server.vllm_api import SamplingParams, TokenizerLike

ABSENT_BEHIND_A_PROXY = (502, 503, 504)
"""Statuses of a proxy whose server is absent."""


class _Answer(msgspec.Struct):
    text: str | None = None


@dataclass(frozen=True)
class ToolAsk(Ask):
    """The request of one call to a tool; ``question`` is its JSON body."""

    question: Mapping[str, Any] = field(default_factory=dict)


class Tool(Teacher):
    """Client of one server of a tool."""

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout: float, breaker: Breaker, of: str
    ) -> None:
        """Arguments as for `Teacher`; ``url`` is the whole URL at which the tool is called."""
        parts = urlsplit(url)
        super().__init__(
            urlunsplit(parts._replace(path="", query="", fragment="")),
            model="a tool",
            api_key=api_key,
            timeout=timeout,
            span_timeout=timeout,
            breaker=breaker,
            vocabulary=0,
            of=of,
        )
        self._path = urlunsplit(("", "", parts.path, parts.query, ""))

    async def connect(self) -> None:
        """Check that the tool's server answers.

        Raises:
            TeacherError: it does not.
        """
        if not await self.healthy():
            raise TeacherError("unreachable", f"the tool at {self.name} does not answer")

    async def healthy(self) -> bool | None:
        """Whether its server answers `/health`, with any status but a proxy's; None if it is too slow.

        A tool need not know that path.
        """
        try:
            async with asyncio.timeout(min(PROBE_SECONDS, self.timeout)):
                status = await self._connection.status("/health")
        except TimeoutError:
            return None
        return status is not None and status not in ABSENT_BEHIND_A_PROXY

    async def _pieces(
        self, ask: Ask, headers: Mapping[str, str], patience: Patience
    ) -> AsyncGenerator[Piece]:
        """The answer as one piece of text, which is empty if the tool has no answer."""
        question = dict(ask.question) if isinstance(ask, ToolAsk) else {}
        connection = self._connection
        async with connection.request("POST", self._path, patience, question, headers) as response:
            payload = await connection.read(response, patience, LONGEST)
        try:
            answer = msgspec.json.decode(payload, type=_Answer) if payload.strip() else _Answer()
        except (msgspec.MsgspecError, ValueError) as error:
            raise TeacherError("nonsense", f"the tool at {self.name}: {error}") from error
        yield Piece([], text=answer.text or "")


class ToolView:
    """A choice as a tool sees it; a `server.teacher.view.TeacherView`."""

    reads = 0
    stuck = False

    def __init__(
        self, words: StudentWords, tokenizer: TokenizerLike, pool: TeacherPool, choice: Choice
    ) -> None:
        self._words = words
        self._tokenizer = tokenizer
        self._pool = pool
        self._choice = choice
        self._written = CompletionText(words, tokenizer, choice)

    @property
    def half_written(self) -> bool:
        """Whether the student's last tokens are a part of a character."""
        return self._written.half_written

    async def room(self) -> int | None:
        """None, because a tool has no context that could be full."""
        return None

    async def write(
        self, slot: Slot, tokens: int, deadline: float, meter: Meter
    ) -> AsyncGenerator[Piece, None]:
        """The whole answer in the student's tokens; nothing if it does not fit, or if a rule forbids it."""
        choice = self._choice
        self._written.read()
        ask = ToolAsk((), tokens, choice.params, meter=meter, as_text=True, question=self._question(tokens))
        answer = ""
        calling = self._pool.write(slot, ask, request_id=choice.call_id, deadline=deadline)
        async with aclosing(calling) as pieces:
            async for piece in pieces:
                answer += piece.text
        delivery = Delivery(self._words, tokens, to_the_end=tokens >= choice.completion.tokens_left)
        ids = [*delivery.add(answer), *delivery.flush()]
        if not ids or delivery.rest:
            return
        if allowed_ids(choice, ids) == ids:
            meter.wrote(len(ids))
            yield Piece(ids)
        elif choice.constraint is not None:  # it has taken a part of the answer
            await choice.constraint.catch_up(choice.completion.token_ids)

    def _question(self, tokens: int) -> dict[str, Any]:
        original = self._choice.original
        question: dict[str, Any] = {"text": self._written.text, "max_tokens": tokens}
        if original is None:
            question["prompt"] = self._tokenizer.decode(self._choice.prompt_ids, skip_special_tokens=True)
        elif "messages" in original.body:
            question["messages"] = original.body["messages"]
        else:
            question["prompt"] = original.body["prompt"]
        return question


@dataclass
class NamedTool(NamedTeacher):
    """A tool among the teachers."""

    student_words: Callable[[], StudentWords] | None = None
    """Returns the student's words; set before the first request."""
    tokenizer: TokenizerLike | None = None
    is_tool = True

    def view(self, choice: Choice) -> ToolView:
        """A choice as this tool sees it."""
        if self.student_words is None or self.tokenizer is None:
            raise RuntimeError("the student's words are not known yet")
        return ToolView(self.student_words(), self.tokenizer, self.pool, choice)

    def obstacle(self, original: OriginalPrompt | None, params: SamplingParams) -> str | None:
        """Name of a parameter that a tool's text cannot honour, if the request has one."""
        return of_one_vocabulary(params)
