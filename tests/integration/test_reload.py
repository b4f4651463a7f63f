"""A router is replaced while the gateway serves."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import httpx

from router.checkpoint import RouterCheckpoint
from server.local.pair import START_SECONDS, Pair, Serving, free_port, gateway_service
from server.local.processes import running
from tests.helpers.client import chat, openai_client

BUDGET = 0.2


async def test_another_router_takes_over_without_a_lost_request(
    stack: Serving, pair: Pair, sources: list[str], tmp_path: Path
) -> None:
    """None at first, then the shipped one, one without taps that never asks, and the shipped one again."""
    router = tmp_path / "router"
    (tmp_path / "empty").mkdir()
    router.symlink_to(tmp_path / "empty")
    shipped = RouterCheckpoint.load(pair.router)
    silent = replace(
        shipped,
        taps=shipped.taps * 0,
        gate={**shipped.gate, "mlp.4.bias": shipped.gate["mlp.4.bias"] - 1e6},
    )
    url = f"http://127.0.0.1:{free_port()}"
    service = gateway_service(replace(pair, router=router), stack.teacher, url, tmp_path)
    with running([service], timeout=START_SECONDS):
        async with openai_client(url) as client, httpx.AsyncClient(base_url=url) as http:

            async def calls() -> list[int]:
                replies = await asyncio.gather(*(chat(client, source, BUDGET) for source in sources[:16]))
                return [reply.teacher["calls"] for reply in replies]

            def put(checkpoint: RouterCheckpoint, name: str) -> None:
                """Next to the old one, and then into its place by a symbolic link."""
                checkpoint.save(tmp_path / name)
                (tmp_path / "link").symlink_to(tmp_path / name)
                os.replace(tmp_path / "link", router)

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

            assert sum(await calls()) > 0, "by an untrained gate"
            put(shipped, "shipped")
            await until_taken(shipped)
            before = await calls()
            assert sum(before) > 16
            put(silent, "silent")
            await until([0] * 16)
            put(shipped, "shipped again")
            await until(before)
