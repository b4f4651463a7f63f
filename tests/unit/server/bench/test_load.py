"""The client of `wheels bench`; no engine is started."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web

from server.bench.load import BenchRequest, drive, quantile
from server.bench.plan import synthetic
from server.bench.servers import in_turn


@pytest.mark.steady_time
async def test_the_client_keeps_its_streams_busy_and_reads_every_answer(unused_tcp_port: int) -> None:
    running = most = 0

    async def complete(request: web.Request) -> web.StreamResponse:
        nonlocal running, most
        running += 1
        most = max(most, running)
        body = await request.json()
        assert body["stream_options"] == {"include_usage": True}
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        for event in (
            {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
            {"choices": [{"delta": {"content": body["messages"][0]["content"]}}]},
            {"choices": [{"delta": {"content": "!"}}], "teacher": {"tokens": 1, "calls": 1}},
            {"choices": [], "usage": {"completion_tokens": 2, "prompt_tokens": 3}},
        ):
            await reply.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await asyncio.sleep(0.01)
        running -= 1
        await reply.write(b"data: [DONE]\n\n")
        return reply

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", unused_tcp_port).start()
    try:
        requests = [BenchRequest.chat(str(number)) for number in range(7)]
        run = await drive(f"http://127.0.0.1:{unused_tcp_port}", "m", requests, 2)
    finally:
        await runner.cleanup()
    assert [a.text for a in run.answers] == [f"{number}!" for number in range(7)]
    assert (run.tokens, run.teacher_tokens, run.calls, most) == (14, 7, 7, 2)
    assert all(len(a.arrivals) == 2 and a.start < a.arrivals[0] <= a.end for a in run.answers)


async def test_an_unreachable_server_raises_one_error(unused_tcp_port: int) -> None:
    with pytest.raises(aiohttp.ClientError, match=str(unused_tcp_port)):
        await drive(
            f"http://127.0.0.1:{unused_tcp_port}", "m", [BenchRequest.chat("a"), BenchRequest.chat("b")], 2
        )


def test_quantiles_are_of_the_nearest_rank() -> None:
    assert (quantile([3, 1, 2], 0.5), quantile([1, 2], 0.99), quantile([], 0.5)) == (2, 2, 0.0)


def test_synthetic_prompts_share_no_prefix() -> None:
    prompts = [tuple(request.body["prompt"]) for turn in range(3) for request in synthetic(40, 24, 8, turn)]
    assert len({prompt[:8] for prompt in prompts}) == len(prompts)
    assert all(5 <= token < 405 for prompt in prompts for token in prompt)


async def test_sides_take_turns_in_alternating_order() -> None:
    order: list[str] = []

    def side(name: str) -> Callable[[int], Awaitable[int]]:
        async def load(turn: int) -> int:
            order.append(f"{name}{turn}")
            return turn

        return load

    found = await in_turn({"a": side("a"), "b": side("b")}, 3, pause=0.0)
    assert order == ["b0", "a0", "a1", "b1", "b2", "a2"]
    assert found == {"a": [0, 1, 2], "b": [0, 1, 2]}
