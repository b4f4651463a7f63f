"""A gateway that starts without a router takes one that comes later, and others after it."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from measuring.pair import START_SECONDS, Pair, Serving, free_port, gateway_service
from measuring.processes import running
from router.checkpoint import RouterCheckpoint
from tests.helpers.client import COMMAND_SECONDS, UNHURRIED, chat, openai_client
from tests.helpers.paths import ROOT

BUDGET = 0.2


class Waiting(NamedTuple):
    """A gateway that began with an empty directory for its router."""

    url: str
    router: Path
    """A link to that directory."""


@pytest.fixture(scope="module")
def waiting(stack: Serving, pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Waiting]:
    directory = tmp_path_factory.mktemp("waiting")
    router = directory / "router"
    (directory / "empty").mkdir()
    router.symlink_to(directory / "empty")
    url = f"http://127.0.0.1:{free_port()}"
    service = gateway_service(replace(pair, router=router), stack.teacher, url, directory, UNHURRIED)
    with running([service], timeout=START_SECONDS):
        yield Waiting(url, router)


def train(settings: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "wheels", "train", "demo", "--stage", "router", *settings],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
    )


def processes_that_name(directory: Path) -> list[str]:
    """Command lines of this machine with a path in a directory."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended by now
            command = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(directory) in command:
                found.append(command)
    return found


@pytest.mark.parametrize("gain", ["{type: regret}", "{type: quality, teacher_references: 2}"])
def test_a_router_is_learned_and_priced_through_both_servers(
    stack: Serving, pair: Pair, waiting: Waiting, gain: str, tmp_path: Path
) -> None:
    """There are two rounds of 40 completions, and the second round's are on the gate's own path."""
    settings = (
        f"output={tmp_path}/pair",
        f"work={tmp_path}/work",
        f"teacher={{url: {stack.teacher}}}",
        f"student={{pretrained: {pair.student}}}",
        "tokenizer=null",
        "router.objective=null",
        f"router.gain={gain}",
        "router.rounds=2",
        "router.prompts=40",
        "router.epochs=1",
        "router.budgets=[0.1, 0.3]",
        "router.calibration_examples=10",
        f"router.rollouts={{type: gateway, url: {waiting.url}, router: {waiting.router}, batch: 10}}",
    )
    done = train(settings)
    assert done.returncode == 0, done.stderr
    made = RouterCheckpoint.load(tmp_path / "pair" / "router")
    assert [rate for rate, _ in made.calibration().points] == [0.1, 0.3]
    assert made.config.training["completions"] == 80
    assert httpx.get(f"{waiting.url}/prices").json()["router"] == made.digest()


def test_the_routers_stage_starts_its_servers_and_ends_them(pair: Pair, tmp_path: Path) -> None:
    """The stage starts teacher and gateway from the directories of the pair."""
    settings = (
        f"output={tmp_path}/pair",
        f"work={tmp_path}/work",
        f"teacher={{pretrained: {pair.teacher}}}",
        f"student={{pretrained: {pair.student}}}",
        "tokenizer=null",
        "router.objective=null",
        "router.rounds=1",
        "router.prompts=20",
        "router.epochs=1",
        "router.budgets=[0.2]",
        "router.calibration_examples=4",
        "router.rollouts={type: gateway, batch: 5}",
    )
    done = train(settings)
    assert done.returncode == 0, done.stderr
    assert "teacher and gateway ready" in done.stdout
    made = RouterCheckpoint.load(tmp_path / "pair" / "router")
    assert [rate for rate, _ in made.calibration().points] == [0.2]
    assert made.config.fingerprints.teacher == "teacher"
    assert processes_that_name(tmp_path) == []


async def test_another_router_takes_over_without_a_lost_request(
    pair: Pair, waiting: Waiting, sources: list[str], tmp_path: Path
) -> None:
    """The routers are the shipped one, one without taps that never asks, and the shipped one again."""
    shipped = RouterCheckpoint.load(pair.router)
    silent = replace(
        shipped,
        taps=shipped.taps * 0,
        gate={**shipped.gate, "mlp.4.bias": shipped.gate["mlp.4.bias"] - 1e6},
    )
    async with openai_client(waiting.url) as client, httpx.AsyncClient(base_url=waiting.url) as http:

        async def calls() -> list[int]:
            replies = await asyncio.gather(*(chat(client, source, BUDGET) for source in sources[:16]))
            return [reply.teacher["calls"] for reply in replies]

        def put(checkpoint: RouterCheckpoint, name: str) -> None:
            """Write the router next to the old one, and replace that by a symbolic link."""
            checkpoint.save(tmp_path / name)
            (tmp_path / "link").symlink_to(tmp_path / name)
            os.replace(tmp_path / "link", waiting.router)

        async def until(expected: list[int]) -> None:
            for _ in range(240):
                if (now := await calls()) == expected:
                    return
                await asyncio.sleep(0.25)
            raise AssertionError(f"after a minute there are still {now} calls")

        async def until_taken(checkpoint: RouterCheckpoint) -> None:
            for _ in range(240):
                if (await http.get("/prices")).json()["router"] == checkpoint.digest():
                    return
                await asyncio.sleep(0.25)
            raise AssertionError("after a minute the router is not in use")

        put(shipped, "shipped")
        await until_taken(shipped)
        before = await calls()
        assert sum(before) > 16
        put(silent, "silent")
        await until([0] * 16)
        put(shipped, "shipped again")
        await until(before)
