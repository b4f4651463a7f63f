"""Duration of a teacher call against the length of its prefix, and where the time goes."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import aiohttp
import msgspec

from server.bench.engine_metrics import EngineWork, Scrape
from server.bench.heavy import lengthen
from server.bench.plan import Plan
from server.bench.results import Columns, Row, Section, Table, spreads
from server.bench.servers import FIRST, MeasuredServer, in_turn, started, stock
from server.teacher.ask import Ask, SpelledIds
from server.teacher.body import COMPLETIONS, GENERATE
from server.teacher.breaker import Breaker
from server.teacher.client import Teacher
from server.vllm_api import SamplingParams

PREFIXES = (100, 1000, 8000, 32_000, 75_000)
QUICK_PREFIXES = (100, 8000)
CONTEXT = 80_000
CALLS = 6
"""Calls of one side, one after the other; each prefix is longer than the last one, as in a completion."""
GROWTH = 10
"""Tokens by which the prefix grows between two calls."""
PAUSE = 0.1
PATIENCE = 300.0
VOCABULARY = 400
"""Token ids of prefixes are below this."""
ENDPOINTS = {"completions": False, "token ids": True}
"""Whether the gateway's client uses the endpoint that takes and gives token ids alone, by side."""

PARTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "completion": (COMPLETIONS, {"return_token_ids": True, "add_special_tokens": False}),
    "without echo": (COMPLETIONS, {"add_special_tokens": False}),
    "token ids, and text": (GENERATE, {}),
    "token ids alone": (GENERATE, {"detokenize": False}),
}
"""Direct requests to the server, by name: the path, and fields that tell what the server has to do."""


@dataclass(frozen=True)
class Calls:
    """Calls of one side, each for one token."""

    seconds: Sequence[float]
    """Seconds of each call."""
    own: float
    """CPU seconds of this process per call, which are the gateway's client's."""
    engine: float
    """Seconds in the teacher's engine per call: waiting, reading and writing."""

    @property
    def each(self) -> float:
        """Average seconds of a call."""
        return sum(self.seconds) / len(self.seconds)

    @property
    def front(self) -> float:
        """Remaining seconds per call: in the teacher's front end and on the way."""
        return self.each - self.own - self.engine


COLUMNS: Columns[Calls] = {
    "ms a call": lambda calls: 1000 * calls.each,
    "gateway": lambda calls: 1000 * calls.own,
    "teacher's front end": lambda calls: 1000 * calls.front,
    "teacher's engine": lambda calls: 1000 * calls.engine,
}

Call = Callable[[list[int]], Awaitable[None]]
"""Asks for one token after this prefix."""


def run(plan: Plan) -> Section:
    """Calls to a stock server with a long context, by the gateway's client and directly."""
    checkpoint = plan.work / "long"
    lengthen(plan.pair.student, checkpoint, CONTEXT)
    service = stock(checkpoint, plan.work, "long", FIRST, "--enable-scale-out")
    with started([service]) as (server,):
        calls, parts = asyncio.run(_all(server, plan))
    about = (
        f"Calls for one token at one stream, each after a prefix that is {GROWTH} tokens longer than the one "
        f"before; the prefix is in the cache. {plan.rounds} rounds of {CALLS} calls, sides in turn. "
    )
    return Section(
        {
            "calls": Table(
                "A teacher call by its prefix",
                calls,
                about
                + "Milliseconds. *Gateway*: CPU time of the gateway's client. *Front end*: of the teacher's "
                "server, and HTTP.",
            ),
            "parts": Table(
                "What the teacher's front end does",
                parts,
                about
                + "Milliseconds above the same call without it. *Echo*: ids of the prompt in the reply. "
                "*Text*: the server turns the whole prompt into text before it writes the first token's.",
            ),
        }
    )


async def _all(server: MeasuredServer, plan: Plan) -> tuple[list[Row], list[Row]]:
    """Rows of calls by the gateway's client, and rows of what the server's front end does."""
    calls: list[Row] = []
    parts: list[Row] = []
    teacher = Teacher(
        server.url, timeout=PATIENCE, span_timeout=PATIENCE, breaker=Breaker(3, 60.0), vocabulary=VOCABULARY
    )
    async with teacher, aiohttp.ClientSession(server.url) as http:
        await teacher.connect()
        for prefix in QUICK_PREFIXES if plan.quick else PREFIXES:
            found = await in_turn(_sides(server, teacher, http, prefix), plan.rounds, PAUSE)
            for side in ENDPOINTS:
                calls.append({"prefix": prefix, "endpoint": side, **spreads(found[side], COLUMNS)})
            parts.append(_parts_row(prefix, [found[part] for part in PARTS]))
    return calls, parts


def _sides(
    server: MeasuredServer, teacher: Teacher, http: aiohttp.ClientSession, prefix: int
) -> dict[str, Callable[[int], Awaitable[Calls]]]:
    sides: dict[str, Callable[[int], Awaitable[Calls]]] = {}
    for side, by_ids in ENDPOINTS.items():
        call = partial(_ask, teacher, by_ids, SpelledIds())
        sides[side] = partial(_measure, server, call, prefix)
    for part, (path, fields) in PARTS.items():
        sides[part] = partial(_measure, server, partial(_post, http, server.model, path, fields), prefix)
    return sides


async def _measure(server: MeasuredServer, call: Call, prefix: int, turn: int) -> Calls:
    """Time one side's calls; the first one fills the cache, and is not counted."""
    ids = [5 + (position * 7919 + prefix) % (VOCABULARY - 5) for position in range(prefix)]
    await call(ids)
    before = Scrape.fetch(server.engine_url)
    cpu = time.process_time()
    seconds: list[float] = []
    for number in range(CALLS):
        ids += [5 + (number + turn) % VOCABULARY] * GROWTH
        start = time.perf_counter()
        await call(ids)
        seconds.append(time.perf_counter() - start)
    own = time.process_time() - cpu
    work = EngineWork.from_growth(Scrape.fetch(server.engine_url).since(before))
    engine = work.queue_seconds + work.prefill_seconds + work.decode_seconds
    return Calls(seconds, own / CALLS, engine / CALLS)


async def _ask(teacher: Teacher, by_ids: bool, spelled: SpelledIds, ids: list[int]) -> None:
    teacher.generates = by_ids
    ask = Ask(list(ids), 1, SamplingParams(temperature=0.0), spelled=spelled)
    async for _ in teacher.write(ask, request_id="bench"):
        pass


async def _post(
    http: aiohttp.ClientSession, model: str, path: str, fields: Mapping[str, Any], ids: list[int]
) -> None:
    sampling: dict[str, Any] = {"temperature": 0.0, "max_tokens": 1}
    body: dict[str, Any]
    if path == GENERATE:
        body = {"model": model, "token_ids": ids, "sampling_params": {**sampling, **fields}}
    else:
        body = {"model": model, "prompt": ids, **sampling, **fields}
    headers = {"Content-Type": "application/json"}
    async with http.post(path, data=msgspec.json.encode(body), headers=headers) as reply:
        content = await reply.read()
        if reply.status != 200:
            raise aiohttp.ClientPayloadError(f"{path} answered {reply.status}: {content.decode()}")


def _parts_row(prefix: int, sides: Sequence[Sequence[Calls]]) -> Row:
    """Milliseconds that echo and text add to a request, by the fastest call of each kind."""
    echoed, plain, text, ids = map(_fastest, sides)
    return {
        "prefix": prefix,
        "completion": echoed,
        "echo": echoed - plain,
        "text": text - ids,
        "token ids alone": ids,
    }


def _fastest(side: Sequence[Calls]) -> float:
    """Milliseconds of the fastest call of all rounds."""
    return 1000 * min(min(calls.seconds) for calls in side)
