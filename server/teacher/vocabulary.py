"""Checks whether the teacher's servers have the student's vocabulary, or at least all the same one."""

import asyncio
import hashlib
import logging
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from router.vocabulary import OTHER_SPLIT, Question, TextQuestion, Tokenizer, questions
from server.teacher.client import Teacher
from server.teacher.errors import TeacherError
from server.teacher.words import TeacherWords, UnusableTokenizer

logger = logging.getLogger(__name__)

GREETING = {"messages": [{"role": "user", "content": "Hello"}]}


class DifferentVocabulary(TeacherError):
    """A server of the teacher has a different vocabulary from the student, or than the others."""

    def __init__(self, message: str) -> None:
        super().__init__("nonsense", message)


class SameVocabulary:
    """Asks a stock vLLM server questions that show whether its vocabulary is the student's.

    The questions are made once. A server answers within a second, also for 150,000 tokens.
    """

    def __init__(self, tokenizer: Tokenizer, rows: int) -> None:
        """``tokenizer``: the student's; below ``rows``, a teacher may have no ids that the student lacks."""
        self.questions: list[Question] = questions(tokenizer, rows)

    async def __call__(self, teacher: Teacher) -> None:
        """Compare the vocabularies. The first text that is split in another way is logged, but allowed.

        Raises:
            DifferentVocabulary: the vocabularies differ.
            TeacherError: the server does not answer.
        """
        warned = False
        for question in self.questions:
            try:
                answer = await teacher.ask(question.path, question.body)
            except TeacherError as error:
                if question.optional and error.reason == "status":
                    continue
                if error.refused:
                    raise DifferentVocabulary(_other(teacher, str(error))) from error
                raise
            problem = question.difference(answer)
            if problem and not question.binding and not warned:
                logger.warning("the teacher at %s %s: %s", teacher.name, OTHER_SPLIT, problem)
                warned = True
            if problem and question.binding:
                raise DifferentVocabulary(_other(teacher, problem))


class OneVocabulary:
    """Checks that all servers of a teacher split texts and write prompts alike; the student may differ."""

    def __init__(self, asked: Sequence[Question], words: TeacherWords) -> None:
        """Prepare the questions.

        Args:
            asked: the questions of `SameVocabulary`; their texts are used.
            words: the teacher's words; they learn from the first server how to continue a text.
        """
        self._bodies = [question.body for question in asked if isinstance(question, TextQuestion)]
        self._words = words
        self._first: Teacher | None = None
        self._answers: list[bytes] = []
        self._lock = asyncio.Lock()

    async def __call__(self, teacher: Teacher) -> None:
        """Compare a server with the first one.

        Raises:
            DifferentVocabulary: the two servers differ.
            TeacherError: the server does not answer, or its tokenizer cannot continue a text.
        """
        async with self._lock:
            answers = [await self._chat(teacher)]
            for body in self._bodies:
                answers.append(_digest(await teacher.ask("/tokenize", body)))
            if self._first is None:
                await self._learn(teacher)
                self._answers = answers
                self._first = teacher
            if answers != self._answers:
                raise DifferentVocabulary(
                    f"the teacher at {teacher.name} has a different vocabulary or chat template "
                    f"from the one at {self._first.name}"
                )

    async def _learn(self, teacher: Teacher) -> None:
        try:
            await self._words.prepare(teacher.ask)
        except UnusableTokenizer as error:
            raise TeacherError("nonsense", f"{error}: {teacher.name}") from error

    async def _chat(self, teacher: Teacher) -> bytes:
        """Digest of a chat's prompt; empty if the server has no chat template, like that of a base model."""
        try:
            return _digest(await teacher.ask("/tokenize", GREETING))
        except TeacherError as error:
            if not error.refused:
                raise
            logger.warning("the teacher at %s accepts plain text only, no chats: %s", teacher.name, error)
            return b""


class Vocabularies:
    """Checks every server of a teacher; the first one tells whether the models have to exchange text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        rows: int,
        words: TeacherWords,
        wanted: Literal["auto", "same", "other"] = "auto",
    ) -> None:
        """Make the questions.

        Args:
            tokenizer: the student's tokenizer.
            rows: the first reserved row; below it, the teacher may have no ids that the student lacks.
            words: the teacher's words, for another vocabulary.
            wanted: the expected vocabulary; "auto" for either.
        """
        self._same = SameVocabulary(tokenizer, rows)
        self._one = OneVocabulary(self._same.questions, words)
        self._lock = asyncio.Lock()
        self.found: Literal["same", "other"] | None = None if wanted == "auto" else wanted
        """Whether the teacher's vocabulary is the student's; None until the first server was asked."""
        self.difference = "it is set"
        """Difference of the first server's vocabulary from the student's, for the log."""

    async def __call__(self, teacher: Teacher) -> None:
        """Check a server. Raises TeacherError if it does not answer, or has not the expected vocabulary."""
        async with self._lock:
            if self.found is None:
                await self._find_out(teacher)
                return
        await (self._same if self.found == "same" else self._one)(teacher)

    async def _find_out(self, teacher: Teacher) -> None:
        try:
            await self._same(teacher)
        except DifferentVocabulary as error:
            await self._one(teacher)
            self.difference = str(error)
            self.found = "other"
        else:
            self.found = "same"


def _other(teacher: Teacher, problem: str) -> str:
    return f"the teacher at {teacher.name} has a different vocabulary from the student: {problem}"


def _digest(answer: dict[str, Any]) -> bytes:
    return hashlib.blake2b(msgspec.json.encode(answer.get("tokens"))).digest()
