"""The end of a gateway: in order, at its deadline, or with its engine."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import APIConnectionError

from measuring.pair import START_SECONDS, Pair, Serving, free_port, gateway_service
from measuring.processes import Child, running
from server.http.lifecycle import HAND_OVER_SECONDS
from tests.helpers.client import PATIENCE, UNHURRIED, chat, openai_client

TOKENS = 250


@contextmanager
def gateway(pair: Pair, teacher: str, logs: Path, *flags: str) -> Iterator[tuple[str, Child]]:
    url = f"http://127.0.0.1:{free_port()}"
    with running(
        [gateway_service(pair, teacher, url, logs, (*UNHURRIED, *flags))], timeout=START_SECONDS
    ) as (child,):
        yield url, child


async def begun(stream: AsyncIterator[Any]) -> list[Any]:
    """A stream's chunks up to the first one with text by a model."""
    chunks = []
    async for chunk in stream:
        chunks.append(chunk)
        if chunk.choices and chunk.choices[0].delta.content:
            break
    return chunks


async def test_at_sigterm_streams_end_normally(
    stack: Serving, pair: Pair, sources: list[str], tmp_path: Path
) -> None:
    with gateway(pair, stack.teacher, tmp_path, "--drain-seconds", "600") as (url, child):
        async with openai_client(url) as client, httpx.AsyncClient(base_url=url, timeout=PATIENCE) as http:
            extra = {"ignore_eos": True}
            streams = await asyncio.gather(
                *(
                    chat(client, source, 0.3, stream=True, max_tokens=TOKENS, extra_body=extra)
                    for source in sources[:12]
                )
            )
            begins = await asyncio.gather(*map(begun, streams))
            child.signal(signal.SIGTERM)
            for _ in range(6000):
                if (ready := await http.get("/ready")).status_code != 200:
                    break
                await asyncio.sleep(0.01)
            assert ready.status_code == 503
            assert (await http.get("/health")).status_code == 200
            for begin, stream in zip(begins, streams, strict=True):
                chunks = begin + [chunk async for chunk in stream]
                ids = [i for c in chunks if c.choices for i in getattr(c.choices[0], "token_ids", None) or ()]
                assert len(ids) == TOKENS
                last = [chunk for chunk in chunks if chunk.choices][-1]
                assert last.choices[0].finish_reason == "length"
                assert last.teacher["calls"] > 1
                assert not last.teacher["degraded"]
        assert child.process.wait(60) == 0
    assert "[server.http.lifecycle] shutting down, running requests: 12" in child.service.log.read_text()


async def test_clients_have_time_to_switch_to_another_gateway(
    stack: Serving, pair: Pair, sources: list[str], tmp_path: Path
) -> None:
    """On a kept connection every request is answered until the gateway has asked to close it."""
    with gateway(pair, stack.teacher, tmp_path) as (url, child):
        prompt = {"prompt": sources[0], "max_tokens": 8, "teacher_budget": 0}
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as http:
            assert (await http.post("/v1/completions", json=prompt)).status_code == 200
            child.signal(signal.SIGTERM)
            begin, answered, told = time.monotonic(), 0, False
            # A client that was told and comes again may be refused.
            with suppress(httpx.NetworkError, httpx.RemoteProtocolError):
                while (reply := await http.post("/v1/completions", json=prompt)).status_code == 200:
                    answered += 1
                    waited = time.monotonic() - begin
                    closes = reply.headers.get("connection") == "close"
                    assert closes or not told, "once the signal has arrived, every reply says it"
                    told = closes
                assert reply.status_code == 503
        assert told
        assert answered >= 2
        assert waited > 0.8 * HAND_OVER_SECONDS
        assert child.process.wait(60) == 0


async def test_at_its_deadline_the_gateway_ends_in_any_case(
    stack: Serving, pair: Pair, sources: list[str], tmp_path: Path
) -> None:
    with gateway(pair, stack.teacher, tmp_path, "--drain-seconds", "0.2") as (url, child):
        async with openai_client(url) as client:
            stream = await chat(
                client, sources[0], 0.3, stream=True, max_tokens=500, extra_body={"ignore_eos": True}
            )
            await begun(stream)
            child.signal(signal.SIGTERM)
            with pytest.raises(APIConnectionError):
                [chunk async for chunk in stream]
        assert child.process.wait(60) == 1
        assert "requests cut off: 1" in child.service.log.read_text()


def test_a_gateway_can_be_ended_while_it_starts(pair: Pair, tmp_path: Path) -> None:
    """The gateway is ended while it waits for its engine, and no process of the engine is left."""
    nobody = f"http://127.0.0.1:{free_port()}"
    child = Child(gateway_service(pair, nobody, f"http://127.0.0.1:{free_port()}", tmp_path))
    try:
        gateway = psutil.Process(child.process.pid)
        engine: list[psutil.Process] = []
        for _ in range(1200):
            with suppress(psutil.NoSuchProcess):  # it ended just now
                engine = [p for p in gateway.children(recursive=True) if "spawn_main" in str(p.cmdline())]
            if engine:
                break
            time.sleep(0.1)
        assert engine
        time.sleep(2)  # the gateway has begun to wait
        child.signal(signal.SIGTERM)
        assert child.process.wait(60) == 128 + signal.SIGTERM
        assert psutil.wait_procs(engine, 60)[1] == []
    finally:
        child.signal(signal.SIGKILL)


async def test_an_idle_connection_is_kept_longer_than_clients_keep_theirs(stack: Serving) -> None:
    """Otherwise a request may be sent on a connection that is being closed, and be lost."""
    async with httpx.AsyncClient(
        base_url=stack.gateway, limits=httpx.Limits(keepalive_expiry=60), timeout=PATIENCE
    ) as http:
        addresses = []
        for seconds in (6, 0):  # uvicorn's default is 5, as is httpx's
            response = await http.get("/health")
            addresses.append(response.extensions["network_stream"].get_extra_info("client_addr"))
            await asyncio.sleep(seconds)
        assert addresses[0] == addresses[1]


async def test_the_gateway_ends_with_its_engine(
    stack: Serving, pair: Pair, sources: list[str], tmp_path: Path
) -> None:
    with gateway(pair, stack.teacher, tmp_path) as (url, child):
        async with openai_client(url) as client:
            await chat(client, sources[0], 0.3)
        (engine,) = [
            process
            for process in psutil.Process(child.process.pid).children(recursive=True)
            if "EngineCore" in process.name()
        ]
        os.kill(engine.pid, signal.SIGKILL)
        assert child.process.wait(60) == 1
        log = child.service.log.read_text()
        assert log.count("wheels serve: the student's engine died") == 1
