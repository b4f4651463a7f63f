"""A client that keeps a number of streams busy, and what it saw."""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import aiohttp


@dataclass(frozen=True)
class Call:
    """A request to be made: the path below the server's address, and its body."""

    path: str
    body: Mapping[str, Any]

    @classmethod
    def chat(cls, source: str, **fields: Any) -> "Call":
        """One user message, answered greedily to its end."""
        messages = [{"role": "user", "content": source}]
        return cls("/v1/chat/completions", {"messages": messages, "temperature": 0} | fields)

    @classmethod
    def tokens(cls, prompt: Sequence[int], length: int, **fields: Any) -> "Call":
        """Token ids continued by exactly ``length`` tokens."""
        fixed = {"prompt": list(prompt), "max_tokens": length, "ignore_eos": True, "temperature": 0}
        return cls("/v1/completions", fixed | fields)


@dataclass(frozen=True)
class Answer:
    """One completion as its client saw it; times in seconds of `time.perf_counter`."""

    start: float
    arrivals: tuple[float, ...]
    """Of every chunk that brought text."""
    end: float
    text: str
    tokens: int
    prompt_tokens: int
    teacher_tokens: int = 0
    calls: int = 0

    @property
    def first(self) -> float:
        """Seconds until the first text."""
        return (self.arrivals[0] if self.arrivals else self.end) - self.start

    @property
    def gaps(self) -> list[float]:
        """Seconds between one chunk and the next."""
        return [later - earlier for earlier, later in pairwise(self.arrivals)]


@dataclass(frozen=True)
class Run:
    """All answers of one load, in the order of its calls."""

    answers: tuple[Answer, ...]
    seconds: float

    @property
    def tokens(self) -> int:
        return sum(answer.tokens for answer in self.answers)

    @property
    def teacher_tokens(self) -> int:
        return sum(answer.teacher_tokens for answer in self.answers)

    @property
    def calls(self) -> int:
        return sum(answer.calls for answer in self.answers)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def first_ms(self) -> float:
        """Median time to the first text."""
        return 1000 * median(answer.first for answer in self.answers)

    def gap_ms(self, share: float) -> float:
        """Quantile of the times between chunks."""
        return 1000 * quantile([gap for answer in self.answers for gap in answer.gaps], share)

    def latency_ms(self, share: float) -> float:
        """Quantile of whole requests' times."""
        return 1000 * quantile([answer.end - answer.start for answer in self.answers], share)


def quantile(values: Sequence[float], share: float) -> float:
    """Nearest rank; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


async def drive(url: str, model: str, calls: Sequence[Call], streams: int, *, stream: bool = True) -> Run:
    """Make all calls, ``streams`` at a time; every stream takes the next call as soon as it is free.

    Raises:
        aiohttp.ClientError: a call was refused, or the server hung up.
    """
    answers: list[Answer | None] = [None] * len(calls)
    waiting = iter(range(len(calls)))
    fixed = {"model": model, "stream": stream}
    if stream:
        fixed["stream_options"] = {"include_usage": True}
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4)  # a proxy may drop idle ones after 5 s
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:

        async def work() -> None:
            for index in waiting:
                call = calls[index]
                answers[index] = await _ask(session, call.path, {**call.body, **fixed})

        start = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(streams, len(calls))):
                    group.create_task(work())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures  # they all fail for one reason
        seconds = time.perf_counter() - start
    return Run(tuple(answer for answer in answers if answer is not None), seconds)


async def _ask(session: aiohttp.ClientSession, path: str, body: Mapping[str, Any]) -> Answer:
    start = time.perf_counter()
    lines: list[tuple[float, bytes]] = []
    async with session.post(path, json=body) as reply:
        if reply.status != 200:
            raise aiohttp.ClientPayloadError(f"{path} answered {reply.status}: {await reply.text()}")
        if body["stream"]:
            async for line in reply.content:
                if line.startswith(b"data: {"):
                    lines.append((time.perf_counter(), line[len(b"data: ") :]))
        else:
            body_text = await reply.read()
            lines.append((time.perf_counter(), body_text))
    end = time.perf_counter()
    return _answer(start, lines, end)  # parsed behind the last token, not between two


def _answer(start: float, lines: Sequence[tuple[float, bytes]], end: float) -> Answer:
    arrivals, pieces, usage, teacher = [], [], {}, {}
    for moment, line in lines:
        event = json.loads(line)
        if "error" in event:
            raise aiohttp.ClientPayloadError(f"the stream broke off: {event['error']}")
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            teacher = choice.get("teacher") or event.get("teacher") or teacher
            message = choice.get("delta") or choice.get("message") or choice
            text = message.get("content") or message.get("text") or ""
            if text:
                arrivals.append(moment)
                pieces.append(text)
    return Answer(
        start=start,
        arrivals=tuple(arrivals),
        end=end,
        text="".join(pieces),
        tokens=usage.get("completion_tokens", 0),
        prompt_tokens=usage.get("prompt_tokens", 0),
        teacher_tokens=teacher.get("tokens", 0),
        calls=teacher.get("calls", 0),
    )
