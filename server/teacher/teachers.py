"""The gateway's teachers by name, from the cheapest to the most expensive."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from router.money import KindCosts, TokenPrices
from server.choice import Choice
from server.metrics import COMPLETION_TOKENS, COST
from server.original_prompt import OriginalPrompt
from server.sources import TEACHER
from server.teacher.errors import TeacherError
from server.teacher.pool import ABSENT, TeacherPool
from server.teacher.translation import Translator, untranslatable
from server.teacher.view import SameTokens, TeacherView
from server.vllm_api import SamplingParams

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.5
"""How often a teacher is looked for that is not up yet."""


def _same_vocabulary() -> None:
    """No translator."""


@dataclass
class NamedTeacher:
    """One teacher as the span loop sees it: its servers, its prices, and how it reads a choice."""

    name: str
    pool: TeacherPool
    prices: TokenPrices | None = None
    find_translator: Callable[[], Translator | None] = _same_vocabulary
    """A teacher that joins late is not known before."""
    is_tool = False

    @property
    def is_known(self) -> bool:
        """Whether a server of it has answered yet."""
        return any(replica.checked for replica in self.pool.replicas)

    @property
    def translator(self) -> Translator | None:
        """What text crosses by; None if the teacher has the student's vocabulary."""
        return self.find_translator()

    def view(self, choice: Choice) -> TeacherView:
        """A choice as this teacher sees it."""
        translator = self.translator
        return SameTokens(self.pool, choice) if translator is None else translator.view(self.pool, choice)

    def obstacle(self, original: OriginalPrompt | None, params: SamplingParams) -> str | None:
        """Name of a parameter that this teacher cannot honour, if the request has one."""
        return None if self.translator is None else untranslatable(original, params)


class Teachers:
    """All teachers of a gateway. Tools come first: they are asked first."""

    def __init__(self, each: Sequence[NamedTeacher], *, priced: bool = False) -> None:
        """``priced``: they are ordered by their prices; else they stay as they are."""
        ordered = sorted(each, key=_rank) if priced else list(each)
        self.tools = tuple(teacher for teacher in ordered if teacher.is_tool)
        self.models = tuple(teacher for teacher in ordered if not teacher.is_tool)
        self._stack = AsyncExitStack()
        for teacher in each:  # a series is there before anything is counted
            COMPLETION_TOKENS.labels(teacher.name)
            for kind in KindCosts.model_fields if teacher.prices is not None else ():
                COST.labels(teacher.name, kind)

    def __iter__(self) -> Iterator[NamedTeacher]:
        yield from self.tools
        yield from self.models

    @property
    def names(self) -> list[str]:
        """Of all."""
        return [teacher.name for teacher in self]

    @property
    def have_names(self) -> bool:
        """Whether the operator named them."""
        return self.names != [TEACHER]

    @property
    def may_translate(self) -> bool:
        """Whether text may cross to one of them, now or when it joins: prompts are kept as they came."""
        return any(teacher.is_tool or teacher.translator or not teacher.is_known for teacher in self)

    async def __aenter__(self) -> "Teachers":
        for teacher in self:
            await self._stack.enter_async_context(teacher.pool)
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()

    def __str__(self) -> str:
        if not self.have_names:
            (only,) = self
            words = "" if only.translator is None else ", which has a vocabulary of its own"
            return f"teacher {only.pool}{words}"
        return "teachers " + "; ".join(f"{teacher.name}: {teacher.pool}" for teacher in self)

    async def connect(self, deadline: float = 0.0) -> None:
        """Find out who is there; until the ``deadline``, wait for all. Later ones join when they answer.

        Raises:
            TeacherError: nobody is there, or one serves another model.
        """
        outcomes = await asyncio.gather(
            *(_connect(teacher.pool, deadline) for teacher in self), return_exceptions=True
        )
        self._judge(outcomes)

    async def healthy(self) -> dict[str, bool]:
        """Who would answer now."""
        answers = await asyncio.gather(*(teacher.pool.healthy() for teacher in self))
        return dict(zip(self.names, answers, strict=True))

    async def watch(self, seconds: float) -> None:
        """Probe all servers of all teachers, for ever."""
        await asyncio.gather(*(teacher.pool.watch(seconds) for teacher in self))

    def _judge(self, outcomes: Sequence[BaseException | None]) -> None:
        """A teacher that is absent may come later, if another one is there."""
        errors = [error for error in outcomes if error is not None]
        for error in errors:
            absent = isinstance(error, TeacherError) and error.reason in ABSENT
            if not absent or len(errors) == len(outcomes):
                raise error
        for teacher, outcome in zip(self, outcomes, strict=True):
            if outcome is not None:
                logger.warning("the teacher %s is not available: %s", teacher.name, outcome)


def _rank(teacher: NamedTeacher) -> tuple[float, float]:
    return (0.0, 0.0) if teacher.prices is None else teacher.prices.rank


async def _connect(pool: TeacherPool, deadline: float) -> None:
    """Connect, trying again until the deadline while the teacher is not up yet."""
    while True:
        try:
            return await pool.connect()
        except TeacherError as error:
            if error.reason not in ABSENT or time.monotonic() >= deadline:
                raise
            await asyncio.sleep(RETRY_SECONDS)
