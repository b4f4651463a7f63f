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
"""Seconds between two tries to connect to a teacher that is not up yet."""


def _same_vocabulary() -> None:
    """No translator, because the teacher has the student's vocabulary."""


@dataclass
class NamedTeacher:
    """One teacher as the span loop sees it: its servers, its prices, and how it reads a choice."""

    name: str
    pool: TeacherPool
    prices: TokenPrices | None = None
    find_translator: Callable[[], Translator | None] = _same_vocabulary
    """Returns `translator`; the vocabulary of a teacher that joins late is not known before."""
    is_tool = False

    @property
    def is_known(self) -> bool:
        """Whether one of its servers has answered and been checked."""
        return any(replica.checked for replica in self.pool.replicas)

    @property
    def translator(self) -> Translator | None:
        """The translator of texts between the models; None if the teacher has the student's vocabulary."""
        return self.find_translator()

    def view(self, choice: Choice) -> TeacherView:
        """A choice as this teacher sees it."""
        translator = self.translator
        return SameTokens(self.pool, choice) if translator is None else translator.view(self.pool, choice)

    def obstacle(self, original: OriginalPrompt | None, params: SamplingParams) -> str | None:
        """Name of a parameter that this teacher cannot honour, if the request has one."""
        return None if self.translator is None else untranslatable(original, params)


class Teachers:
    """All teachers of a gateway. Tools come first, because they are asked first."""

    def __init__(self, each: Sequence[NamedTeacher], *, priced: bool = False) -> None:
        """``priced``: whether to order the teachers by their prices; else their order stays."""
        ordered = sorted(each, key=_rank) if priced else list(each)
        self.tools = tuple(teacher for teacher in ordered if teacher.is_tool)
        self.models = tuple(teacher for teacher in ordered if not teacher.is_tool)
        self._stack = AsyncExitStack()
        for teacher in each:  # each series exists before anything is counted
            COMPLETION_TOKENS.labels(teacher.name)
            for kind in KindCosts.model_fields if teacher.prices is not None else ():
                COST.labels(teacher.name, kind)

    def __iter__(self) -> Iterator[NamedTeacher]:
        yield from self.tools
        yield from self.models

    @property
    def names(self) -> list[str]:
        """Names of all teachers."""
        return [teacher.name for teacher in self]

    @property
    def have_names(self) -> bool:
        """Whether the operator named the teachers."""
        return self.names != [TEACHER]

    @property
    def may_translate(self) -> bool:
        """Whether a teacher may exchange text, now or when it joins; original prompts are then kept."""
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
        """Connect to all teachers; wait for them until the ``deadline``. Later ones join when they answer.

        ``deadline``: in seconds of `time.monotonic`.

        Raises:
            TeacherError: no teacher is up, or one serves another model.
        """
        outcomes = await asyncio.gather(
            *(_connect(teacher.pool, deadline) for teacher in self), return_exceptions=True
        )
        self._judge(outcomes)

    async def healthy(self) -> dict[str, bool]:
        """Whether each teacher answers its health check now, by its name."""
        answers = await asyncio.gather(*(teacher.pool.healthy() for teacher in self))
        return dict(zip(self.names, answers, strict=True))

    async def watch(self, seconds: float) -> None:
        """Probe all servers of all teachers, forever."""
        await asyncio.gather(*(teacher.pool.watch(seconds) for teacher in self))

    def _judge(self, outcomes: Sequence[BaseException | None]) -> None:
        """Raise an error that stops the start: any but the absence of some teachers, which may come later."""
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
