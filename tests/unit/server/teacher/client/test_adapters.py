"""A teacher's own LoRA adapters, by the names of the student's."""

import pytest

from tests.helpers.fake_teacher import body, choice
from tests.helpers.teacher_calls import calls, collect, failure, write

pytestmark = pytest.mark.steady_time

WROTE = body(choice([7]))
GONE = body({"error": {"message": "The model `tuned` does not exist.", "code": 404}}, status=404)


def serves(server, *names: str) -> None:
    server.models = {"data": [{"id": name} for name in names]}


async def asked(server, teacher, adapter: str | None) -> str:
    """The model that the teacher is asked for."""
    await collect(write(teacher, 1, adapter=adapter))
    return server.bodies[-1]["model"]


async def test_the_teacher_is_asked_for_its_adapter_of_that_name_else_for_its_base_model(server, teacher):
    serves(server, "big", "tuned")
    server.answers = [WROTE]
    await teacher.connect()
    assert await asked(server, teacher, "tuned") == "tuned"
    assert await asked(server, teacher, "unknown") == "big"
    assert await asked(server, teacher, None) == "big"


async def test_an_adapter_that_comes_later_is_used_from_the_next_probe_on(server, teacher):
    serves(server, "big")
    server.answers = [WROTE]
    await teacher.connect()
    assert await asked(server, teacher, "tuned") == "big"
    serves(server, "big", "tuned")
    assert await teacher.healthy()
    assert await asked(server, teacher, "tuned") == "tuned"


async def test_adapters_are_looked_up_only_if_a_request_needs_one(server, teacher):
    serves(server, "big")
    await teacher.connect()
    server.models = "nothing that can be read"
    assert await teacher.healthy()


async def test_an_unreadable_list_of_models_does_not_make_a_teacher_unhealthy(server, teacher):
    serves(server, "big")
    server.answers = [WROTE]
    await teacher.connect()
    await asked(server, teacher, "tuned")
    server.models = "nothing that can be read"
    assert await teacher.healthy()
    assert await asked(server, teacher, "tuned") == "big"


async def test_an_adapter_that_is_gone_is_replaced_by_the_base_model_within_the_call(server, teacher):
    serves(server, "big", "tuned")
    server.answers = [GONE, WROTE]
    await teacher.connect()
    before = calls(teacher, "ok")
    (piece,) = await collect(write(teacher, 1, adapter="tuned"))
    assert piece.token_ids == [7]
    assert [sent["model"] for sent in server.bodies] == ["tuned", "big"]
    assert calls(teacher, "ok") == before + 1
    assert not teacher.breaker.tripped
    assert await asked(server, teacher, "tuned") == "big"


async def test_a_teacher_without_its_own_model_fails_as_before(server, teacher):
    serves(server, "big", "tuned")
    server.answers = [GONE]
    await teacher.connect()
    error = await failure(write(teacher, 1, adapter="tuned"))
    assert (error.reason, error.refused) == ("status", False)
    assert [sent["model"] for sent in server.bodies] == ["tuned", "big"]
