"""Budgets that are set without a field of the body: by the name of a model, or by a header."""

import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest
import yaml
from openai import AsyncOpenAI

from measuring.pair import Serving
from tests.helpers.client import PATIENCE, openai_client
from tests.helpers.gateways import StartGateway

ORIGIN = "https://app.example"
HEADER = "X-Teacher-Budget"
NAMES = {"wheels-fast": 0, "wheels-best": 1, "wheels-careful": {"fraction": 0.5, "calls": 1}}
SURFACES = (
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
)


@pytest.fixture(scope="module")
def named(gateway: StartGateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A gateway whose default is the student alone, with further names of models."""
    logs = tmp_path_factory.mktemp("names")
    settings = {"default_budget": 0, "models": NAMES, "vllm": {"allowed-origins": [ORIGIN]}}
    file = logs / "wheels.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    with gateway(logs, "--config", str(file)) as named:
        yield named


@pytest.fixture
async def client(named: Serving) -> AsyncIterator[AsyncOpenAI]:
    async with openai_client(named.gateway) as client:
        yield client


def chat(source: str, **fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": source}
    return {"model": "wheels", "messages": [message], "temperature": 0, "max_tokens": 96} | fields


def body(path: str, source: str, **fields: Any) -> dict[str, Any]:
    """A request of one surface for one completion."""
    fields = {"model": "wheels", "temperature": 0} | fields
    if path == "/v1/completions":
        return {"prompt": source, "max_tokens": 20} | fields
    if path == "/v1/responses":
        return {"input": source, "max_output_tokens": 20} | fields
    messages: list[Any] = [{"role": "user", "content": source}]
    return {"messages": [messages] if path.endswith("/batch") else messages, "max_tokens": 20} | fields


async def test_all_names_are_listed(client: AsyncOpenAI) -> None:
    listed = await client.models.list()
    assert [model.id for model in listed.data] == ["wheels", *NAMES]


@pytest.mark.parametrize("model", ["wheels", *NAMES])
async def test_the_name_of_a_model_is_its_budget(client: AsyncOpenAI, sources: list[str], model: str) -> None:
    reply = await client.chat.completions.create(**chat(sources[6], model=model))
    assert reply.model == model
    assert reply.teacher["calls"] == (1 if model in ("wheels-best", "wheels-careful") else 0)
    assert (reply.teacher["rate"] == 1) == (model == "wheels-best")
    stream = await client.chat.completions.create(**chat(sources[6], model=model, stream=True))
    chunks = [chunk async for chunk in stream]
    assert {chunk.model for chunk in chunks} == {model}
    assert chunks[-1].teacher == reply.teacher


@pytest.mark.parametrize("path", SURFACES)
@pytest.mark.parametrize("model", ["wheels-fast", "wheels-best"])
async def test_every_surface_knows_the_names(
    named: Serving, sources: list[str], path: str, model: str
) -> None:
    async with httpx.AsyncClient(base_url=named.gateway, timeout=PATIENCE) as http:
        reply = (await http.post(path, json=body(path, sources[0], model=model))).json()
        assert (reply["model"], reply["teacher"]["rate"]) == (model, float(model == "wheels-best"))
        if path.endswith("/batch"):  # which has no streams
            return
        streamed = (await http.post(path, json=body(path, sources[0], model=model, stream=True))).text
    assert set(re.findall(r'"model": ?"([^"]*)"', streamed)) == {model}


async def test_clients_send_the_budget_as_a_header(client: AsyncOpenAI, sources: list[str]) -> None:
    best = client.with_options(default_headers={HEADER: "1"})
    assert (await best.chat.completions.create(**chat(sources[0]))).teacher["rate"] == 1
    assert (await best.completions.create(**body("/v1/completions", sources[0]))).teacher["rate"] == 1
    assert (await best.responses.create(**body("/v1/responses", sources[0]))).teacher["rate"] == 1
    one_call = client.with_options(default_headers={HEADER: '{"calls": 1}'})
    assert (await one_call.chat.completions.create(**chat(sources[6]))).teacher["calls"] == 1


@pytest.mark.parametrize("path", SURFACES)
@pytest.mark.parametrize(
    ("model", "header", "field", "rate"),
    [
        ("wheels-best", None, 0, 0),
        ("wheels-best", "0", None, 0),
        ("wheels-fast", "1", None, 1),
        ("wheels-fast", "0", 1, 1),
    ],
)
async def test_the_field_wins_over_the_header_and_the_header_over_the_name(
    named: Serving,
    sources: list[str],
    path: str,
    model: str,
    header: str | None,
    field: float | None,
    rate: float,
) -> None:
    headers = {} if header is None else {HEADER: header}
    request = body(path, sources[0], model=model, teacher_budget=field)
    async with httpx.AsyncClient(base_url=named.gateway, timeout=PATIENCE) as http:
        reply = (await http.post(path, json=request, headers=headers)).json()
    assert reply["teacher"]["rate"] == rate


async def test_a_bad_header_is_named(client: AsyncOpenAI, sources: list[str]) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        await client.with_options(default_headers={HEADER: "lots"}).chat.completions.create(
            **chat(sources[0])
        )
    assert error.value.param == HEADER


async def test_structured_output_works_under_a_name(client: AsyncOpenAI, sources: list[str]) -> None:
    reply = await client.chat.completions.create(
        **chat(sources[0], model="wheels-best", extra_body={"structured_outputs": {"choice": ["Ja", "Nein"]}})
    )
    assert reply.choices[0].message.content in ("Ja", "Nein")


async def test_other_names_are_unknown(client: AsyncOpenAI, sources: list[str]) -> None:
    with pytest.raises(openai.NotFoundError, match="wheels-careful"):
        await client.chat.completions.create(**chat(sources[0], model="wheels-worst"))


async def test_a_browser_may_send_the_header(named: Serving) -> None:
    asked = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type,x-teacher-budget",
    }
    async with httpx.AsyncClient(base_url=named.gateway, timeout=PATIENCE) as http:
        answer = await http.options("/v1/chat/completions", headers=asked)
    assert answer.status_code == 200
    assert "x-teacher-budget" in answer.headers["access-control-allow-headers"]
