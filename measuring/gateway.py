"""A client that asks a running gateway as its users do: through OpenAI's own client."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import msgspec
from openai import APIStatusError, AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError

from measuring.chats import Source, messages_of
from measuring.trajectories import in_order, within
from router.address import base_url
from router.errors import PeerError

SHOWN_PROBLEM = 300
"""Number of characters of an error reply that are passed on."""
Wire = TypeVar("Wire", bound=msgspec.Struct)


class GatewayError(PeerError):
    """The gateway is unreachable, refuses, or gives an unusable answer; the message names its URL."""


@dataclass(frozen=True)
class GatewayReply:
    """One completion and who wrote it."""

    text: str
    token_ids: list[int]
    spans: list[tuple[int, int]]
    """[start, end) token offsets of the teacher's spans."""
    prompt_tokens: int
    teacher_tokens: int
    calls: int
    degraded: bool
    """Whether the teacher was lost and the student finished alone."""
    denied: Mapping[str, int] = field(default_factory=dict)
    """How often the student asked and had to go on alone, by reason."""
    clamped: bool = False
    """Whether the budget was cut to the maximum of the API key."""

    @property
    def by_teacher(self) -> list[bool]:
        """For each token, whether the teacher wrote it."""
        return within(self.spans, len(self.token_ids))


class GatewayPrice(msgspec.Struct, frozen=True):
    """The price of a teacher token that realises one teacher rate, in the gate's units."""

    rate: float
    price: float


class GatewayPrices(msgspec.Struct, frozen=True):
    """The prices of a gateway."""

    learned: bool
    """Whether the gateway's traffic moves the prices."""
    prices: list[GatewayPrice]
    """The prices, ordered by increasing rate."""
    router: str | None = None
    """Digest of the router in use."""


class GatewayClient:
    """A client of one gateway with a bounded number of requests at once.

    Args:
        url: base URL of the gateway, without /v1.
        concurrency: largest number of requests at once.
        max_tokens: longest completion, in tokens; None: as long as the gateway allows.
        api_key: API key of the gateway's tenant.
        timeout: longest wait for one completion, in seconds.
        retries: how often to repeat a request that failed for a reason that may pass.
        transport: HTTP client to use; None: the one of OpenAI's client.
        temperature: sampling temperature; None: the gateway's default.
    """

    def __init__(
        self,
        url: str,
        *,
        concurrency: int,
        max_tokens: int | None = None,
        api_key: str = "none",
        timeout: float = 600.0,
        retries: int = 0,
        transport: DefaultAsyncHttpxClient | None = None,
        temperature: float | None = 0.0,
    ) -> None:
        self._url = base_url(url)
        self._optional: dict[str, Any] = {}
        if max_tokens is not None:
            self._optional["max_tokens"] = max_tokens
        if temperature is not None:
            self._optional["temperature"] = temperature
        self._openai = AsyncOpenAI(
            base_url=f"{self._url}/v1",
            api_key=api_key,
            timeout=timeout,
            max_retries=retries,
            http_client=transport,
        )
        self._slots = asyncio.Semaphore(concurrency)
        self._model = ""

    async def __aenter__(self) -> "GatewayClient":
        try:
            raw = await self._openai.models.with_raw_response.list()
        except OpenAIError as error:
            await self._openai.close()
            raise self._error(_problem(error)) from error
        served = self._decoded(raw.content, _GatewayModels).data
        if not served:
            raise self._error("it serves no model")
        self._model = served[0].id
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._openai.close()

    async def prices(self) -> GatewayPrices:
        """The gateway's prices, by teacher rate.

        Raises:
            GatewayError: the request fails, or the reply cannot be read.
        """
        try:
            reply = await self._openai.get(f"{self._url}/prices", cast_to=object)
            return msgspec.convert(reply, GatewayPrices)
        except OpenAIError as error:
            raise self._error(_problem(error)) from error
        except msgspec.ValidationError as error:
            raise self._error(f"its prices cannot be read: {error}") from error

    async def ask(self, source: Source, budget: float) -> GatewayReply:
        """The reply to one prompt.

        Args:
            source: the prompt.
            budget: largest share of the completion's tokens that the teacher may write, in [0, 1].

        Raises:
            GatewayError: the request fails, or the reply cannot be used.
        """
        try:
            async with self._slots:
                raw = await self._openai.chat.completions.with_raw_response.create(
                    model=self._model,
                    messages=cast(Any, messages_of(source)),
                    extra_body={"teacher_budget": budget, "return_token_ids": True},
                    **self._optional,
                )
        except OpenAIError as error:
            raise self._error(_problem(error)) from error
        return self._reply(self._decoded(raw.content, _Chat))

    async def ask_all(
        self, sources: Sequence[Source], budget: float, advance: Callable[[], None] = lambda: None
    ) -> list[GatewayReply]:
        """The replies to several prompts, in their order; ``advance`` is called after each reply.

        Raises:
            GatewayError: a request failed; the others are cancelled.
        """

        async def ask(source: Source) -> GatewayReply:
            reply = await self.ask(source, budget)
            advance()
            return reply

        return await _together([ask(source) for source in sources])

    async def write(self, ids: list[int], longest: int) -> list[int]:
        """Token ids that the student alone writes after a prompt, greedily.

        Args:
            ids: the prompt, as token ids.
            longest: largest number of tokens to write.

        Raises:
            GatewayError: the request fails, or the reply is not one completion of 1 to ``longest`` tokens.
        """
        try:
            async with self._slots:
                raw = await self._openai.completions.with_raw_response.create(
                    model=self._model,
                    prompt=ids,
                    max_tokens=longest,
                    temperature=0,
                    extra_body={"teacher_budget": 0, "return_token_ids": True},
                )
        except OpenAIError as error:
            raise self._error(_problem(error)) from error
        choices = self._decoded(raw.content, _Completion).choices
        if len(choices) != 1 or not 0 < len(choices[0].token_ids) <= longest:
            raise self._error(f"it did not answer with one completion of 1 to {longest} tokens")
        return choices[0].token_ids

    async def write_all(self, begun: Sequence[list[int]], longest: Sequence[int]) -> list[list[int]]:
        """The results of `write` for several prompts and their longest completions, in order.

        Raises:
            GatewayError: a request failed; the others are cancelled.
        """
        return await _together([self.write(*each) for each in zip(begun, longest, strict=True)])

    def _reply(self, chat: "_Chat") -> GatewayReply:
        if chat.teacher is None:
            raise self._error("its replies have no `teacher`: was it started with `wheels serve`?")
        if len(chat.choices) != 1:
            raise self._error(f"it answered with {len(chat.choices)} choices to a request for one")
        choice = chat.choices[0]
        if not choice.token_ids:
            raise self._error("it answered without a token")
        if not in_order(chat.teacher.spans, len(choice.token_ids)):
            raise self._error(f"the teacher's spans {chat.teacher.spans} do not fit the completion")
        return GatewayReply(
            text=choice.message.content or "",
            token_ids=choice.token_ids,
            spans=chat.teacher.spans,
            prompt_tokens=chat.usage.prompt_tokens,
            teacher_tokens=chat.teacher.tokens,
            calls=chat.teacher.calls,
            degraded=chat.teacher.degraded,
            denied=chat.teacher.denied,
            clamped=chat.teacher.clamped,
        )

    def _decoded(self, content: bytes, kind: type[Wire]) -> Wire:
        try:
            return msgspec.json.decode(content, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._error(f"its reply cannot be read: {error}") from error

    def _error(self, problem: str) -> GatewayError:
        return GatewayError(f"the gateway at {self._url}: {problem}")


Answer = TypeVar("Answer")


async def _together(asked: Sequence[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """The results of all coroutines, in order; the first failure is raised, and the others are cancelled."""
    try:
        tasks = []
        async with asyncio.TaskGroup() as group:
            for coroutine in asked:
                tasks.append(group.create_task(coroutine))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures  # they all fail for one reason
    return [task.result() for task in tasks]


class _GatewayModel(msgspec.Struct):
    id: str


class _GatewayModels(msgspec.Struct):
    data: list[_GatewayModel]


class _Message(msgspec.Struct):
    content: str | None = None


class _ChatChoice(msgspec.Struct):
    message: _Message
    token_ids: list[int]


class _CompletionChoice(msgspec.Struct):
    token_ids: list[int]


class _Completion(msgspec.Struct):
    choices: list[_CompletionChoice]


class _Usage(msgspec.Struct):
    prompt_tokens: int


class _Teacher(msgspec.Struct):
    spans: list[tuple[int, int]]
    tokens: int
    calls: int
    degraded: bool
    denied: dict[str, int] = msgspec.field(default_factory=dict)
    clamped: bool = False


class _Chat(msgspec.Struct):
    choices: list[_ChatChoice]
    usage: _Usage
    teacher: _Teacher | None = None


def _problem(error: OpenAIError) -> str:
    return error.response.text[:SHOWN_PROBLEM] if isinstance(error, APIStatusError) else str(error)
