"""A recipe that names its models on the hub."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest

from router.hub import fetch
from tests.helpers.commands import train
from tests.helpers.fake_hub import FakeHub
from tests.helpers.numbers import save_untrained_pair, tokenizer_of_numbers
from tests.helpers.recipes import SCHEDULE, write_recipe
from training import hub as training_hub
from training.hub import directory_of


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of an untrained pair, by the names of its models."""
    directory = tmp_path_factory.mktemp("pair")
    save_untrained_pair(tokenizer_of_numbers(), directory)
    models = {}
    for role in ("student", "teacher"):
        found = (directory / role).iterdir()
        models[f"small/{role}"] = {path.name: path.read_bytes() for path in found if path.is_file()}
    return models


@pytest.fixture
async def hub(
    files: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[FakeHub]:
    older = {"config.json": b"{}", "pytorch_model.bin": b"weights", "README.md": b"text"}
    async with FakeHub({**files, "old/model": older}, ("main", "v2")) as hub:
        monkeypatch.setattr(training_hub, "fetch", partial(fetch, cache=tmp_path / "cache", endpoint=hub.url))
        training_hub._fetched.cache_clear()
        yield hub
        training_hub._fetched.cache_clear()


@pytest.fixture
def trained(tmp_path: Path) -> Callable[[str], int]:
    """A function that runs `wheels train` with a student's name and returns the exit status."""
    schedule = SCHEDULE | {"steps": 2, "batch": 4}
    recipe = write_recipe(
        tmp_path,
        tmp_path,
        teacher={"pretrained": "small/teacher@main"},
        student={"pretrained": "small/student", "method": {"type": "kd"}, "schedule": schedule},
    )
    return lambda name: train([recipe, "--stage", "student", f"student.pretrained={name}"])


async def test_a_pair_is_trained_by_names_with_revisions(
    hub: FakeHub, trained: Callable[[str], int], tmp_path: Path
) -> None:
    assert await asyncio.to_thread(trained, "small/student@v2") == 0
    assert (tmp_path / "out" / "student" / "model.safetensors").is_file()
    teacher = (tmp_path / "out" / "teacher").resolve()
    assert teacher == directory_of("small/teacher@main").resolve()
    assert teacher.is_relative_to(tmp_path / "cache" / "models--small--teacher")
    fetched = list(hub.asked)
    assert await asyncio.to_thread(trained, "small/student@v2") == 0
    assert hub.asked == fetched  # and the finished run is recognised as the same one


async def test_a_missing_revision_is_named(
    hub: FakeHub, trained: Callable[[str], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert await asyncio.to_thread(trained, "small/student@v3") == 2
    assert "small/student has no revision v3 on the hub" in capsys.readouterr().err


async def test_a_model_without_safetensors_is_fetched_in_its_older_format(hub: FakeHub) -> None:
    directory = await asyncio.to_thread(directory_of, "old/model")
    assert (directory / "pytorch_model.bin").read_bytes() == b"weights"
    assert sorted(hub.asked) == ["config.json", "pytorch_model.bin"]
