"""A teacher's HTTP side, and clients of it."""

from collections.abc import AsyncIterator

import pytest

from server.teacher.client import Teacher
from tests.helpers.fake_teacher import Server
from tests.helpers.teacher_calls import client


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with Server() as server:
        yield server


@pytest.fixture
async def teacher(server) -> AsyncIterator[Teacher]:
    async with client(server.url) as teacher:
        yield teacher
