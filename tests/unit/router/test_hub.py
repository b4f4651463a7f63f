"""Models that are given by their names on the hub."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from router.hub import NotOnHub, fetch
from tests.helpers.fake_hub import FakeHub

NEEDED = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "chat_template.jinja",
    "tokenizer.model",
    "router/router.json",
}
OTHERS = {"README.md", "pytorch_model.bin", "original/model.safetensors", "consolidated.safetensors"}
FILES = {path: path.encode() for path in NEEDED | OTHERS}


@pytest.fixture
async def hub() -> AsyncIterator[FakeHub]:
    async with FakeHub(
        {"small/student": FILES, "small/router": {"router.json": b"{}"}}, ("main", "v2")
    ) as hub:
        yield hub


async def fetched(hub: FakeHub, name: str, cache: Path) -> Path:
    return await asyncio.to_thread(fetch, name, cache, hub.url)


@pytest.mark.parametrize("name", ["small/student", "small/student@v2"])
async def test_only_the_files_that_are_needed_are_fetched_and_once(hub, tmp_path, name):
    directory = await fetched(hub, name, tmp_path)
    assert set(hub.asked) == NEEDED
    assert {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()} == NEEDED
    assert (directory / "model.safetensors").read_bytes() == b"model.safetensors"
    assert await fetched(hub, name, tmp_path) == directory
    assert len(hub.asked) == len(NEEDED)


async def test_further_files_are_fetched_where_they_are_needed(hub, tmp_path):
    directory = await asyncio.to_thread(fetch, "small/student", tmp_path, hub.url, others=["*.bin"])
    assert (directory / "pytorch_model.bin").is_file()
    assert set(hub.asked) == {*NEEDED, "pytorch_model.bin"}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("small/nothing", "no such directory, and the hub has no model small/nothing"),
        ("small/student@v3", "small/student has no revision v3"),
        ("gated/student", "gated/student: access has to be asked for on the hub"),
        ("/no/such/place", "no such directory, and not a name on the hub: /no/such/place"),
    ],
)
async def test_a_name_that_does_not_work_is_reported_in_one_line(hub, tmp_path, name, problem):
    with pytest.raises(NotOnHub, match=problem) as error:
        await fetched(hub, name, tmp_path)
    assert "\n" not in str(error.value)


async def test_without_the_hub_the_cache_serves(hub, tmp_path):
    directory = await fetched(hub, "small/student", tmp_path)
    gone = "http://127.0.0.1:9"
    assert await asyncio.to_thread(fetch, "small/student", tmp_path, gone) == directory
    with pytest.raises(NotOnHub, match=r"not in the hub's cache, and the hub cannot be reached") as error:
        await asyncio.to_thread(fetch, "small/router", tmp_path, gone)
    assert "\n" not in str(error.value)


def test_a_start_without_the_hub_ends_in_one_line(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "wheels",
            "serve",
            "--student",
            "small/student",
            "--teacher",
            "http://127.0.0.1:9",
        ],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "wheels serve: student: no such directory: small/student; it is not in the hub's cache, and the hub "
        "cannot be reached\n"
    )


async def test_names_become_directories_without_a_progress_bar_where_there_is_no_terminal(hub, tmp_path):
    program = (
        "import sys, server.config as config, server.hub as hub\n"
        "found = hub.with_directories(config.load(sys.argv[1:]))\n"
        "print(found.student, found.router)"
    )
    flags = ["--student", "small/student", "--router", str(tmp_path), "--teacher", "http://teacher"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, *flags),
        env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    student, router = output.decode().split()  # nothing else was printed
    assert (Path(student) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert Path(student).is_relative_to(tmp_path / "cache")
    assert router == str(tmp_path)
    assert set(hub.asked) == NEEDED
