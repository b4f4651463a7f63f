"""One gateway with two teachers in real engines: the demo's teacher, and its student as the cheap one."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import AsyncOpenAI, BadRequestError

from measuring.pair import HOST, Pair, Serving
from router.checkpoint import RouterCheckpoint, TeacherOutput
from tests.helpers.client import chat, excess, metric, openai_client
from tests.helpers.gateways import StartGateway

PRICES = {
    "student": {"input": 0.1, "output": 0.4},
    "teacher": {"teacher": {"input": 2, "output": 10}, "small": {"input": 0.5, "output": 2}},
}


class Stamp(BaseHTTPRequestHandler):
    """A tool that answers only at the beginning of a completion."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = json.dumps({} if asked["text"] else {"text": "Nr. 7: "}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def tool() -> Iterator[str]:
    """The tool's URL."""
    server = ThreadingHTTPServer((HOST, 0), Stamp)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://{HOST}:{server.server_port}/stamp"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def router(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the demo's router, in a directory of its own."""
    directory = tmp_path_factory.mktemp("router")
    RouterCheckpoint.load(pair.router).save(directory)
    return directory


@pytest.fixture(scope="module")
def both(
    gateway: StartGateway, twins: Serving, tool: str, router: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serving]:
    """A gateway with two teachers. The teacher without a name is called "teacher"."""
    named = ("--teacher", f"small={twins.teacher}", "--teacher", f"stamp={json.dumps({'tool': tool})}")
    flags = (*named, "--prices", json.dumps(PRICES))
    with gateway(tmp_path_factory.mktemp("both"), *flags, router=router) as serving:
        yield serving


@pytest.fixture
async def two(both: Serving) -> AsyncIterator[AsyncOpenAI]:
    async with openai_client(both.gateway) as client:
        yield client


async def test_each_teacher_writes_a_part_and_every_bound_holds(
    two: AsyncOpenAI, both: Serving, sources: list[str], span_tokens: int
) -> None:
    budget = {"fraction": 0.4, "teachers": ["small", "teacher"]}
    replies = await asyncio.gather(*(chat(two, source, budget) for source in sources[:40]))
    tokens = {"small": 0, "teacher": 0}
    for reply in replies:
        report = reply.teacher
        parts = report.get("teachers", {})
        assert excess(reply, 0.4, span_tokens) <= 1e-9
        assert sum(part["tokens"] for part in parts.values()) == report["tokens"]
        assert sum(part["cost"] for part in parts.values()) == pytest.approx(report["cost"])
        assert sorted(span for part in parts.values() for span in part["spans"]) == report["spans"]
        for name, part in parts.items():
            tokens[name] += part["tokens"]
    assert min(tokens.values()) > 0
    for name, count in tokens.items():
        assert metric(both.gateway, "wheels_completion_tokens_total", source=name) >= count
        assert metric(both.gateway, "wheels_teacher_calls_total", teacher=name, outcome="ok") > 0


async def test_at_a_budget_of_one_the_dear_teacher_writes_alone(
    two: AsyncOpenAI, client: AsyncOpenAI, sources: list[str]
) -> None:
    for source in sources[:4]:
        alone = await chat(client, source, 1)
        reply = await chat(two, source, {"fraction": 1, "teachers": ["small", "teacher"]})
        assert reply.choices[0].token_ids == alone.choices[0].token_ids
        assert reply.teacher["teachers"].keys() == {"teacher"}


async def test_a_request_names_who_may_be_asked(two: AsyncOpenAI, sources: list[str]) -> None:
    budget = {"fraction": 0.5, "teachers": {"small": None, "teacher": {"tokens": 3}}}
    asked = [(source, budget) for source in sources[:8]]
    asked += [(source, {"fraction": 0.5, "teachers": ["small"]}) for source in sources[:8]]
    replies = await asyncio.gather(*(chat(two, source, budget) for source, budget in asked))
    for reply in replies[:8]:
        assert reply.teacher.get("teachers", {}).get("teacher", {"tokens": 0})["tokens"] <= 3
    for reply in replies[8:]:
        assert reply.teacher.get("teachers", {}).keys() <= {"small"}


async def test_chunks_name_the_teacher(two: AsyncOpenAI, sources: list[str]) -> None:
    seen: set[str] = set()
    for name in ("small", "teacher"):
        budget: dict[str, Any] = {"fraction": 0.9, "teachers": [name]}
        stream = await chat(two, sources[0], budget, stream=True)
        chunks = [chunk async for chunk in stream]
        here = {chunk.source for chunk in chunks}
        assert here <= {"student", name}
        seen |= here
    assert {"small", "teacher"} <= seen


async def test_an_unknown_name_is_refused(two: AsyncOpenAI) -> None:
    with pytest.raises(
        BadRequestError, match="no teacher is named 'huge'; there are: stamp, small, teacher"
    ) as e:
        await chat(two, "Hi", {"fraction": 0.5, "teachers": ["huge"]})
    assert e.value.body["param"] == "teacher_budget"


async def test_the_gateway_lists_its_teachers(both: Serving) -> None:
    async with httpx.AsyncClient(base_url=both.gateway) as http:
        ready = (await http.get("/ready")).json()
    assert ready["teachers"] == {"stamp": True, "small": True, "teacher": True}


async def test_a_tool_writes_whole_answers(two: AsyncOpenAI, sources: list[str]) -> None:
    """At a budget of 1 the tool is asked before the teacher, which then writes the rest."""
    reply = await chat(two, sources[0], 1)
    assert reply.choices[0].message.content.startswith("Nr. 7: ")
    assert reply.teacher["teachers"].keys() == {"stamp", "teacher"}
    assert reply.teacher["teachers"]["stamp"]["calls"] == 1
    assert reply.teacher["rate"] == 1


# A router with an output for each of them


def of_two(demo: RouterCheckpoint, outputs: list[float]) -> RouterCheckpoint:
    """A router whose worths of small and teacher are the demo's score times these; 0: a negative worth."""
    gate = dict(demo.gate)
    gate["mlp.4.weight"] = torch.cat([demo.gate["mlp.4.weight"] * share for share in outputs])
    bias = torch.cat([demo.gate["mlp.4.bias"] * share for share in outputs])
    gate["mlp.4.bias"] = torch.where(torch.tensor(outputs) == 0, -1.0, bias)
    teachers = (TeacherOutput(name="small", cost=0.5), TeacherOutput(name="teacher", cost=1.0))
    return replace(demo, config=demo.config.model_copy(update={"teachers": teachers}), gate=gate)


async def taken(gateway: Serving, directory: Path, router: RouterCheckpoint) -> None:
    """Wait until the gateway serves with a router."""
    router.save(directory)
    async with httpx.AsyncClient(base_url=gateway.gateway) as http:
        for _ in range(240):
            if (await http.get("/prices")).json()["router"] == router.digest():
                return
            await asyncio.sleep(0.25)
    raise AssertionError("after a minute the router is not in use")


async def test_a_router_with_an_output_for_each_teacher_decides_which_is_asked(
    two: AsyncOpenAI, both: Serving, pair: Pair, router: Path, sources: list[str], span_tokens: int
) -> None:
    """The gateway takes the router while it serves, and then another one."""
    demo = RouterCheckpoint.load(pair.router)
    budget = {"fraction": 0.3, "teachers": ["small", "teacher"]}
    try:
        for outputs, names in (([1.0, 0.0], {"small"}), ([0.0, 1.0], {"teacher"})):
            await taken(both, router, of_two(demo, outputs))
            replies = await asyncio.gather(*(chat(two, source, budget) for source in sources[:20]))
            assert sum(reply.teacher["tokens"] for reply in replies) > 20
            assert {name for reply in replies for name in reply.teacher.get("teachers", {})} == names
            for reply in replies:
                assert excess(reply, 0.3, span_tokens) <= 1e-9
        only = {"fraction": 0.3, "teachers": ["small"]}
        reply = await chat(two, sources[0], only)  # the gate finds this teacher useless
        assert reply.teacher["tokens"] == 0
    finally:
        await taken(both, router, demo)
