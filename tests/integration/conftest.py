"""Real engines: the shipped pair, a stock vLLM server for the teacher, the gateway for the student."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from openai import AsyncOpenAI

from measuring.pair import HOST, START_SECONDS, Pair, Serving, free_port, gateway_service, serving
from measuring.processes import running
from tests.helpers.client import PRICES, UNHURRIED, openai_client
from tests.helpers.gateways import StartGateway
from tests.helpers.paths import DEMO


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.integration)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(1800))  # engines are slow on a busy machine


@pytest.fixture(scope="session")
def pair() -> Pair:
    return Pair.in_directory(DEMO)


@pytest.fixture(scope="session")
def span_tokens(pair: Pair) -> int:
    return json.loads((pair.router / "router.json").read_text())["span_tokens"]


@pytest.fixture(scope="session")
def sources() -> list[str]:
    """Held-out inputs of the demo task."""
    return [json.loads(line)["source"] for line in (DEMO / "examples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def stack(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    examples = ("--examples", str(DEMO / "examples.jsonl"))
    flags = (*UNHURRIED, *examples, "--prices", json.dumps(PRICES))
    with serving(pair, tmp_path_factory.mktemp("logs"), flags=flags) as stack:
        yield stack


@pytest.fixture(scope="session")
def gateway(stack: Serving, pair: Pair) -> StartGateway:
    """`gateway(directory, *flags)` starts one more gateway for the teacher that runs already."""

    @contextmanager
    def start(directory: Path, *flags: str, router: Path = pair.router) -> Iterator[Serving]:
        url = f"http://{HOST}:{free_port()}"
        served = replace(pair, router=router)
        service = gateway_service(served, stack.teacher, url, directory, (*UNHURRIED, *flags))
        with running([service], timeout=START_SECONDS) as (child,):
            yield Serving(stack.teacher, url, stack.teacher_process, child)

    return start


@pytest.fixture(scope="session")
def twins(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A pair in which teacher = student, the gate asks at random, and the teacher takes only token ids."""
    twin = Pair(teacher=pair.student, student=pair.student, router=pair.router)
    logs = tmp_path_factory.mktemp("twins")
    flags = (*UNHURRIED, "--gate", "random")
    with serving(twin, logs, flags=flags, teacher_flags=("--enable-scale-out",)) as stack:
        yield stack


@pytest.fixture
async def client(stack: Serving) -> AsyncIterator[AsyncOpenAI]:
    async with openai_client(stack.gateway) as client:
        yield client


@pytest.fixture
async def teacher_client(stack: Serving) -> AsyncIterator[AsyncOpenAI]:
    async with openai_client(stack.teacher) as client:
        yield client
