"""Creates the configured teachers, and finds out which vocabulary each of them uses."""

import logging
from collections.abc import Callable
from typing import Literal

from router.money import FREE
from server.config import ServeConfig
from server.teacher.breaker import Breaker
from server.teacher.client import Teacher
from server.teacher.errors import TeacherError
from server.teacher.pool import TeacherPool
from server.teacher.teachers import NamedTeacher, Teachers
from server.teacher.tool import NamedTool, Tool
from server.teacher.translation import Translator
from server.teacher.vocabulary import Vocabularies
from server.teacher.words import StudentWords, TeacherWords, UnusableTokenizer
from server.teacher_settings import TeacherSettings
from server.vllm_api import TokenizerLike

logger = logging.getLogger(__name__)


def build_teachers(config: ServeConfig, visible: int) -> Teachers:
    """Clients of all configured teachers; ``visible``: the student's token ids are below this."""
    prices = config.prices
    each = []
    for name, settings in config.teachers.items():
        own = None if prices is None else prices.of_teacher(name)
        if settings.tool is None:
            each.append(NamedTeacher(name, _pool(config, name, settings, visible), own))
        else:
            own = FREE if prices is not None and own is None else own
            each.append(NamedTool(name, _tool_pool(config, name, settings), own))
    return Teachers(each, priced=prices is not None)


def _pool(config: ServeConfig, name: str, settings: TeacherSettings, visible: int) -> TeacherPool:
    key = settings.api_key
    replicas = [
        Teacher(
            str(url),
            model=settings.model,
            api_key=key.get_secret_value() if key else None,
            timeout=settings.timeout or config.teacher_timeout,
            span_timeout=config.span_timeout,
            breaker=Breaker(config.breaker_failures, config.breaker_seconds),
            vocabulary=visible,
            of=name if isinstance(config.teacher, dict) else "",
        )
        for url in settings.url or ()
    ]
    return TeacherPool(replicas, concurrency=config.teacher_concurrency, queue_seconds=config.teacher_queue)


def _tool_pool(config: ServeConfig, name: str, settings: TeacherSettings) -> TeacherPool:
    key = settings.api_key
    replicas = [
        Tool(
            str(url),
            api_key=key.get_secret_value() if key else None,
            timeout=settings.timeout or config.teacher_timeout,
            breaker=Breaker(config.breaker_failures, config.breaker_seconds),
            of=name,
        )
        for url in settings.tool or ()
    ]
    return TeacherPool(replicas, concurrency=config.teacher_concurrency, queue_seconds=config.teacher_queue)


async def introduce(teachers: Teachers, config: ServeConfig, tokenizer: TokenizerLike, rows: int) -> None:
    """Compare the vocabulary of every reachable teacher with the student's; others are compared later.

    Args:
        teachers: the teachers from `build_teachers`.
        config: the configuration, which tells the vocabulary expected of each teacher.
        tokenizer: the student's tokenizer.
        rows: the first reserved row; a teacher may have no id below it that the student does not have.

    Raises:
        TeacherError: a teacher has another vocabulary than it should, or than its other replicas; or the
            student cannot take another model's text.
    """
    student = _WordsOfStudent(tokenizer)
    for tool in teachers.tools:
        if isinstance(tool, NamedTool):
            tool.student_words = student
            tool.tokenizer = tokenizer
    for teacher in teachers.models:
        crossing = _Crossing(teacher.name, tokenizer, rows, config.teachers[teacher.name].vocabulary, student)
        teacher.find_translator = crossing.translator
        await teacher.pool.check_vocabulary(crossing)


class _WordsOfStudent:
    """The student's words, made when a teacher first needs them: not every tokenizer can continue a text."""

    def __init__(self, tokenizer: TokenizerLike) -> None:
        self._tokenizer = tokenizer
        self._words: StudentWords | None = None

    def __call__(self) -> StudentWords:
        if self._words is None:
            self._words = StudentWords(self._tokenizer)
        return self._words


class _Crossing:
    """Checks every server of one teacher, and makes a translator if the vocabularies differ."""

    def __init__(
        self,
        name: str,
        tokenizer: TokenizerLike,
        rows: int,
        wanted: Literal["auto", "same", "other"],
        student: Callable[[], StudentWords],
    ) -> None:
        self._name = name
        self._tokenizer = tokenizer
        self._words = TeacherWords()
        self._vocabularies = Vocabularies(tokenizer, rows, self._words, wanted)
        self._student = student
        self._translator: Translator | None = None

    async def __call__(self, teacher: Teacher) -> None:
        """Check a server as `Vocabularies`. Raises TeacherError too if the student cannot take other text."""
        await self._vocabularies(teacher)
        if self._vocabularies.found != "other" or self._translator is not None:
            return
        difference = self._vocabularies.difference
        logger.warning("student and teacher exchange text, not token ids: %s", difference)
        try:
            words = self._student()
        except UnusableTokenizer as error:
            problem = f"student: {error}, and the teacher has another vocabulary"
            raise TeacherError("nonsense", problem) from error
        self._translator = Translator(words, self._words, self._tokenizer, self._name)

    def translator(self) -> Translator | None:
        """The translator; None if the teacher has the student's vocabulary, or it is not known yet."""
        return self._translator
