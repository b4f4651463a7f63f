"""A client that keeps a number of streams busy, and its measurements."""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import aiohttp

from measuring.chats import Source, messages_of

EVENT = b"data: "
"""Beginning of every line of a stream that has an event."""


@dataclass(frozen=True)
class BenchRequest:
    """A request to be made."""

    path: str
    """Path below the server's address."""
    body: Mapping[str, Any]

    @classmethod
    def chat(cls, source: Source, **fields: Any) -> "BenchRequest":
        """A request for a chat, answered greedily to its end."""
        messages = messages_of(source)
        return cls("/v1/chat/completions", {"messages": messages, "temperature": 0} | fields)

    @classmethod
    def tokens(cls, prompt: Sequence[int], length: int, **fields: Any) -> "BenchRequest":
        """A request that continues token ids by exactly ``length`` tokens."""
        fixed = {"prompt": list(prompt), "max_tokens": length, "ignore_eos": True, "temperature": 0}
        return cls("/v1/completions", fixed | fields)


@dataclass(frozen=True)
class Answer:
    """One completion as its client saw it; times in seconds of `time.perf_counter`."""

    start: float
    arrivals: tuple[float, ...]
    """Time of every chunk that brought text."""
    end: float
    text: str
    tokens: int
    prompt_tokens: int
    teacher_tokens: int = 0
    calls: int = 0
    """Number of teacher calls."""

    @property
    def first(self) -> float:
        """Seconds until the first text."""
        return (self.arrivals[0] if self.arrivals else self.end) - self.start

    @property
    def seconds(self) -> float:
        """Seconds of the whole request."""
        return self.end - self.start

    @property
    def gaps(self) -> list[float]:
        """Seconds between one chunk and the next."""
        return [later - earlier for earlier, later in pairwise(self.arrivals)]


@dataclass(frozen=True)
class LoadRun:
    """All answers of one load, in the order of its requests."""

    answers: tuple[Answer, ...]
    seconds: float

    @property
    def tokens(self) -> int:
        """Number of completion tokens."""
        return sum(answer.tokens for answer in self.answers)

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of all prompts."""
        return sum(answer.prompt_tokens for answer in self.answers)

    @property
    def teacher_tokens(self) -> int:
        """Number of completion tokens that the teacher wrote."""
        return sum(answer.teacher_tokens for answer in self.answers)

    @property
    def calls(self) -> int:
        """Number of teacher calls."""
        return sum(answer.calls for answer in self.answers)

    @property
    def teacher_rate(self) -> float:
        """Teacher tokens / completion tokens."""
        return self.teacher_tokens / self.tokens

    @property
    def tokens_per_second(self) -> float:
        """Completion tokens a second, of all streams together."""
        return self.tokens / self.seconds

    @property
    def requests_per_second(self) -> float:
        """Requests a second, of all streams together."""
        return len(self.answers) / self.seconds

    @property
    def latencies(self) -> list[float]:
        """Seconds of every request."""
        return [answer.seconds for answer in self.answers]

    @property
    def first_ms(self) -> float:
        """Median time to the first text, in milliseconds."""
        return 1000 * median(answer.first for answer in self.answers)

    def gap_ms(self, share: float) -> float:
        """Quantile of the times between chunks, in milliseconds; ``share`` in [0, 1]."""
        gaps: list[float] = []
        for answer in self.answers:
            gaps += answer.gaps
        return 1000 * quantile(gaps, share)

    def latency_ms(self, share: float) -> float:
        """Quantile of the whole requests' times, in milliseconds; ``share`` in [0, 1]."""
        return 1000 * quantile(self.latencies, share)


def quantile(values: Sequence[float], share: float) -> float:
    """The value of the nearest rank; 0 if there are no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def drive(
    url: str, model: str, requests: Sequence[BenchRequest], streams: int, *, stream: bool = True
) -> LoadRun:
    """Make all requests, ``streams`` at a time; every stream takes the next one as soon as it is free.

    Raises:
        aiohttp.ClientError: a request was refused, or the server hung up.
    """
    fixed: dict[str, Any] = {"model": model, "stream": stream}
    if stream:
        fixed["stream_options"] = {"include_usage": True}
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4)  # a proxy may drop idle ones after 5 s
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        start = time.perf_counter()
        answers = await _answers(session, requests, streams, fixed)
        seconds = time.perf_counter() - start
    return LoadRun(answers, seconds)


async def _answers(
    session: aiohttp.ClientSession,
    requests: Sequence[BenchRequest],
    streams: int,
    fixed: Mapping[str, Any],
) -> tuple[Answer, ...]:
    """The answers in the order of the requests; ``fixed``: fields that every body has."""
    answers: dict[int, Answer] = {}
    waiting = iter(range(len(requests)))

    async def work() -> None:
        for index in waiting:
            request = requests[index]
            answers[index] = await _ask(session, request.path, {**request.body, **fixed})

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(streams, len(requests))):
                group.create_task(work())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures  # they all fail for one reason
    return tuple(answers[index] for index in range(len(requests)))


class Arrival(NamedTuple):
    """One event of a reply."""

    moment: float
    event: bytes
    """JSON of the event."""


async def _ask(session: aiohttp.ClientSession, path: str, body: Mapping[str, Any]) -> Answer:
    start = time.perf_counter()
    arrivals: list[Arrival] = []
    async with session.post(path, json=body) as reply:
        if reply.status != 200:
            raise aiohttp.ClientPayloadError(f"{path} answered {reply.status}: {await reply.text()}")
        if not body["stream"]:
            whole = await reply.read()
            arrivals.append(Arrival(time.perf_counter(), whole))
        else:
            async for line in reply.content:
                if line.startswith(EVENT + b"{"):
                    arrivals.append(Arrival(time.perf_counter(), line.removeprefix(EVENT)))
    end = time.perf_counter()
    return _answer(start, arrivals, end)  # parsed after the last token, not between two


def _answer(start: float, arrivals: Sequence[Arrival], end: float) -> Answer:
    moments: list[float] = []
    pieces: list[str] = []
    usage: dict[str, int] = {}
    teacher: dict[str, Any] = {}
    for arrival in arrivals:
        event = json.loads(arrival.event)
        if "error" in event:
            raise aiohttp.ClientPayloadError(f"the stream broke off: {event['error']}")
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            teacher = choice.get("teacher") or event.get("teacher") or teacher
            text = _text(choice)
            if text:
                moments.append(arrival.moment)
                pieces.append(text)
    return Answer(
        start=start,
        arrivals=tuple(moments),
        end=end,
        text="".join(pieces),
        tokens=usage.get("completion_tokens", 0),
        prompt_tokens=usage.get("prompt_tokens", 0),
        teacher_tokens=teacher.get("tokens", 0),
        calls=teacher.get("calls", 0),
    )


def _text(choice: Mapping[str, Any]) -> str:
    """Text of a choice, in a chat or not, streamed or not."""
    message = choice.get("delta") or choice.get("message") or choice
    text: str | None = message.get("content") or message.get("text")
    return text or ""
