"""Teachers of a configuration: some have to be there at the start, and others may join later."""

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from server.config import ServeConfig
from server.teacher.errors import TeacherError
from server.teacher.teachers import Teachers
from server.teachers_start import build_teachers, introduce
from tests.helpers.fluent_teacher import FluentTeacher, byte_level

OURS = byte_level(["the student's words"], 280)
THEIRS = byte_level(["what another teacher would say"], 290)
NOBODY = "http://127.0.0.1:1"
PRICES = {
    "student": {"input": 0, "output": 0},
    "teacher": {"big": {"input": 1, "output": 9}, "small": {"input": 1, "output": 2}},
}


def config(directory: Path, teacher: Any, **more: Any) -> ServeConfig:
    return ServeConfig.model_validate({"student": directory, "teacher": teacher, **more})


async def test_each_teacher_has_a_vocabulary_of_its_own(tmp_path: Path) -> None:
    async with FluentTeacher(OURS, "Hi") as same, FluentTeacher(THEIRS, "Hi") as other:
        settings = config(tmp_path, {"big": other.url, "small": same.url}, prices=PRICES)
        async with build_teachers(settings, 280) as teachers:
            await teachers.connect()
            await introduce(teachers, settings, OURS, 0)
            assert teachers.names == ["small", "big"]  # ordered by their prices
            assert [teacher.translator is not None for teacher in teachers] == [False, True]
            assert await teachers.healthy() == {"small": True, "big": True}
            assert str(teachers) == (
                f"teachers small: big at {same.url[7:-1]}; big: big at {other.url[7:-1]}"
            )


async def test_a_missing_teacher_joins_when_it_answers(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        small = await stack.enter_async_context(FluentTeacher(OURS, "Hi"))
        late = await stack.enter_async_context(FluentTeacher(THEIRS, "Hi"))
        settings = config(tmp_path, {"small": small.url, "big": late.url})
        teachers = await stack.enter_async_context(build_teachers(settings, 280))
        (replica,) = teachers.models[1].pool.replicas
        connection = replica.teacher._connection
        url, connection.url = connection.url, NOBODY
        await teachers.connect()
        await introduce(teachers, settings, OURS, 0)
        assert teachers.models[1].pool.down
        assert teachers.may_translate  # a missing teacher may have any vocabulary
        connection.url = url
        await teachers.models[1].pool._probe(replica)
        assert not teachers.models[1].pool.down
        assert teachers.models[1].translator is not None


async def test_without_any_teacher_the_gateway_does_not_start(tmp_path: Path) -> None:
    for teacher in (NOBODY, {"small": NOBODY, "big": "http://127.0.0.1:2"}):
        async with build_teachers(config(tmp_path, teacher), 280) as teachers:
            with pytest.raises(TeacherError, match="cannot reach the teacher"):
                await teachers.connect()


async def test_a_wrong_model_ends_the_start_even_if_other_teachers_answer(tmp_path: Path) -> None:
    async with FluentTeacher(OURS, "Hi") as server:
        settings = config(tmp_path, {"small": server.url, "big": {"url": server.url, "model": "huge"}})
        async with build_teachers(settings, 280) as teachers:
            with pytest.raises(TeacherError, match="'huge'"):
                await teachers.connect()


async def test_a_single_teacher_is_called_teacher(tmp_path: Path) -> None:
    async with FluentTeacher(OURS, "Hi") as server:
        settings = config(tmp_path, server.url)
        async with build_teachers(settings, 280) as teachers:
            await teachers.connect()
            await introduce(teachers, settings, OURS, 0)
            assert isinstance(teachers, Teachers)
            assert (teachers.names, teachers.have_names) == (["teacher"], False)
            assert str(teachers) == f"teacher big at {server.url[7:-1]}"
