"""The first server shows whether the models exchange text. The other servers have to be like it."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from transformers import PreTrainedTokenizerFast

from server.teacher.breaker import Breaker
from server.teacher.client import Teacher
from server.teacher.errors import TeacherError
from server.teacher.pool import TeacherPool
from server.teacher.vocabulary import Vocabularies
from server.teacher.words import TeacherWords
from tests.helpers.fluent_teacher import FluentTeacher, byte_level

OURS = byte_level(["the student's words"], 280)
THEIRS = byte_level(["what another teacher would say"], 290)


@asynccontextmanager
async def pool(*tokenizers: PreTrainedTokenizerFast) -> AsyncIterator[TeacherPool]:
    async with AsyncExitStack() as stack:
        teachers = []
        for tokenizer in tokenizers:
            server = await stack.enter_async_context(FluentTeacher(tokenizer, "Hi"))
            teachers.append(Teacher(server.url, breaker=Breaker(3, 60.0), vocabulary=280))
        pool = await stack.enter_async_context(TeacherPool(teachers, concurrency=1, queue_seconds=1))
        await pool.connect()
        yield pool


@pytest.mark.parametrize(
    ("theirs", "wanted", "found"),
    [
        ([OURS], "auto", "same"),
        ([OURS, OURS], "same", "same"),
        ([THEIRS], "auto", "other"),
        ([THEIRS, THEIRS], "auto", "other"),
        ([OURS], "other", "other"),
    ],
)
async def test_the_kind_of_vocabulary_is_found_out_or_set(
    theirs: list[PreTrainedTokenizerFast], wanted: str, found: str
) -> None:
    vocabularies = Vocabularies(OURS, 0, TeacherWords(), wanted)
    async with pool(*theirs) as replicas:
        await replicas.check_vocabulary(vocabularies)
        assert [replica.checked for replica in replicas.replicas] == [True] * len(theirs)
    assert vocabularies.found == found


@pytest.mark.parametrize(
    ("theirs", "wanted", "problem"),
    [
        ([THEIRS], "same", "has a different vocabulary from the student: "),
        ([OURS, THEIRS], "auto", "a different vocabulary"),
        ([THEIRS, byte_level(["and a third one, with a third one's words"], 290)], "auto", "from the one at"),
    ],
)
async def test_servers_of_another_vocabulary_are_refused(
    theirs: list[PreTrainedTokenizerFast], wanted: str, problem: str
) -> None:
    vocabularies = Vocabularies(OURS, 0, TeacherWords(), wanted)
    async with pool(*theirs) as replicas:
        with pytest.raises(TeacherError, match=problem):
            await replicas.check_vocabulary(vocabularies)


async def test_a_question_goes_to_a_replica_that_is_up() -> None:
    async with pool(THEIRS, THEIRS) as replicas:
        first, second = replicas._ranked(b"key")
        first.up = False
        answer = await replicas.ask(b"key", "/tokenize", {"prompt": "what", "add_special_tokens": False})
        assert answer["tokens"] == THEIRS.encode("what")
        second.up = False
        with pytest.raises(TeacherError) as error:
            await replicas.ask(b"key", "/tokenize", {"prompt": "what", "add_special_tokens": False})
        assert error.value.reason == "breaker"
