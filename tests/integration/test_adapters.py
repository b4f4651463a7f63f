"""A student with LoRA adapters: stock vLLM's teacher is the same model, with some of the same adapters."""

import dataclasses
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from measuring.pair import HOST, START_SECONDS, Pair, Serving, free_port, gateway_service, teacher_service
from measuring.processes import Service, running
from tests.helpers.adapters import save_adapter, save_base
from tests.helpers.client import PATIENCE, UNHURRIED, chat, openai_client, source_of_tokens
from tests.helpers.paths import DEMO

PRICE = -0.5
"""Price at which the margin gate asks if the gap of the best two log-probabilities is below 0.5."""
BUDGETS = '{"tuned": 1, "student-only": 0.5}'
FLAGS = ("--enable-lora", "--max-loras", "3", "--max-cpu-loras", "3", "--max-logprobs", "-1")
RUNTIME = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A running pair, and the directory of an adapter that neither has loaded."""

    serving: Serving
    late: Path


def with_adapters(service: Service, **adapters: Path) -> Service:
    modules = [f"{name.replace('_', '-')}={directory}" for name, directory in adapters.items()]
    command = (*service.command, *FLAGS, "--lora-modules", *modules)
    return dataclasses.replace(service, command=command, environment={**service.environment, **RUNTIME})


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adapted]:
    directory = tmp_path_factory.mktemp("adapters")
    base = directory / "base"
    rows = save_base(base, DEMO / "student")
    tuned, student_only, late = [
        save_adapter(directory / name, rows, seed) for seed, name in enumerate(("tuned", "student", "late"))
    ]
    teacher, url = (f"http://{HOST}:{free_port()}" for _ in range(2))
    flags = (*UNHURRIED, "--gate", "margin", "--price", str(PRICE), "--teacher-probe", "0.5")
    flags += ("--cache", str(directory / "cache"), "--models", BUDGETS)
    services = [
        with_adapters(teacher_service(base, teacher, directory), tuned=tuned),
        with_adapters(
            gateway_service(Pair(base, base, None), teacher, url, directory, flags),
            tuned=tuned,
            student_only=student_only,
        ),
    ]
    with running(services, timeout=START_SECONDS) as (first, second):
        yield Adapted(Serving(teacher, url, first, second), late)


@pytest.fixture
async def gateway(adapted: Adapted) -> AsyncIterator[AsyncOpenAI]:
    async with openai_client(adapted.serving.gateway) as client:
        yield client


@pytest.fixture
async def stock(adapted: Adapted) -> AsyncIterator[AsyncOpenAI]:
    async with openai_client(adapted.serving.teacher) as client:
        yield client


async def own(stock: AsyncOpenAI, source: str, model: str, **asked: Any) -> Any:
    """The completion that stock vLLM writes alone."""
    return await chat(stock, source, model=model, **asked)


def ids(reply: Any) -> list[int]:
    return list(reply.choices[0].token_ids)


@pytest.mark.parametrize("budget", [0, 0.3, 0.7, 1])
async def test_at_every_budget_the_adapter_writes_its_own_text(
    gateway: AsyncOpenAI, stock: AsyncOpenAI, sources: list[str], budget: float
) -> None:
    """Both models have the adapter, so it does not matter who writes."""
    spans = 0
    for source in sources[:6]:
        alone = await own(stock, source, "tuned")
        assert ids(alone) != ids(await own(stock, source, "teacher"))
        together = await chat(gateway, source, budget, model="tuned")
        assert ids(together) == ids(alone)
        assert together.model == "tuned"
        assert together.choices[0].message.content == alone.choices[0].message.content
        spans += len(together.teacher["spans"])
    assert spans == 0 if budget == 0 else spans >= 6


async def test_the_base_model_is_unchanged(
    gateway: AsyncOpenAI, stock: AsyncOpenAI, sources: list[str]
) -> None:
    for budget in (0, 0.3, 1):
        together = await chat(gateway, sources[0], budget)
        assert ids(together) == ids(await own(stock, sources[0], "teacher"))


async def test_a_teacher_without_the_adapter_writes_as_its_base_model(
    gateway: AsyncOpenAI, stock: AsyncOpenAI, sources: list[str]
) -> None:
    base = await own(stock, sources[0], "teacher")
    alone = await chat(gateway, sources[0], 0, model="student-only")
    assert ids(alone) != ids(base)
    by_teacher = await chat(gateway, sources[0], 1, model="student-only")
    assert ids(by_teacher) == ids(base)
    assert by_teacher.teacher["rate"] == 1
    mixed = await chat(gateway, sources[0], 0.5, model="student-only")
    assert 0 < mixed.teacher["tokens"] < len(ids(mixed))
    first = mixed.teacher["spans"][0][0]
    assert ids(mixed)[:first] == ids(alone)[:first]


async def test_the_gate_reads_the_logits_of_the_adapted_student(
    gateway: AsyncOpenAI, sources: list[str]
) -> None:
    """The pair is one model, so the reported log-probabilities are those that the gate saw."""
    asked = 0
    for source in sources[:6]:
        reply = await chat(gateway, source, 0.95, model="tuned", logprobs=True, top_logprobs=2)
        assert reply.teacher["denied"] == {}
        for by_teacher, entry in zip(source_of_tokens(reply), reply.choices[0].logprobs.content, strict=True):
            best, second = entry.top_logprobs
            score = second.logprob - best.logprob
            if abs(score - PRICE) > 1e-3:
                assert (score > PRICE) == by_teacher
            asked += by_teacher
    assert asked > 20


async def test_the_prompts_log_probabilities_are_those_of_stock_vllm(
    gateway: AsyncOpenAI, stock: AsyncOpenAI, sources: list[str]
) -> None:
    """The original has no spare row, so the appended rows must not change the log-probabilities."""
    asked = {"max_tokens": 24, "extra_body": {"prompt_logprobs": 3}}
    for model, theirs in (("tuned", "tuned"), ("wheels", "teacher")):
        expected = (await own(stock, sources[1], theirs, **asked)).prompt_logprobs
        for budget in (0, 0.3, 1):
            found = (await chat(gateway, sources[1], budget, model=model, **asked)).prompt_logprobs
            assert rounded(found) == pytest.approx(rounded(expected), abs=1e-3)


def rounded(prompt_logprobs: list[Any]) -> dict[tuple[int, str], float]:
    """Log-probabilities by (place, token), rounded."""
    found = {}
    for place, entry in enumerate(prompt_logprobs[1:]):
        for token, values in entry.items():
            found[place, token] = values["logprob"]
    return found


@pytest.mark.parametrize("budget", [0, 0.3, 1])
async def test_all_log_probabilities_are_those_of_stock_vllm(
    gateway: AsyncOpenAI, stock: AsyncOpenAI, sources: list[str], budget: float
) -> None:
    """At every token of prompt and completion, all tokens of the tokenizer have one, and no other row."""
    extra = {"prompt_logprobs": -1, "return_tokens_as_token_ids": True}
    asked = {"max_tokens": 12, "logprobs": True, "top_logprobs": -1, "extra_body": extra}
    expected = await own(stock, sources[1], "tuned", **asked)
    found = await chat(gateway, sources[1], budget, model="tuned", **asked)
    assert rounded(found.prompt_logprobs) == pytest.approx(rounded(expected.prompt_logprobs), abs=1e-3)
    rows = len(found.prompt_logprobs[-1])
    for ours, theirs in zip(
        found.choices[0].logprobs.content, expected.choices[0].logprobs.content, strict=True
    ):
        assert len(ours.top_logprobs) == len(theirs.top_logprobs) == rows
        assert {top.token: top.logprob for top in ours.top_logprobs} == pytest.approx(
            {top.token: top.logprob for top in theirs.top_logprobs}, abs=1e-3
        )


async def test_an_adapters_name_may_have_a_budget(
    adapted: Adapted, gateway: AsyncOpenAI, sources: list[str]
) -> None:
    listed = [model.id for model in (await gateway.models.list()).data]
    assert listed == ["wheels", "tuned", "student-only"]
    assert (await chat(gateway, sources[2], model="tuned")).teacher["rate"] == 1
    half = await chat(gateway, sources[2], model="student-only")
    assert 0 < half.teacher["rate"] < 1
    assert (await chat(gateway, sources[2], 0, model="tuned")).teacher["calls"] == 0


async def test_a_stream_uses_the_adapter_too(
    gateway: AsyncOpenAI, stock: AsyncOpenAI, sources: list[str]
) -> None:
    alone = await own(stock, sources[3], "tuned")
    stream = await chat(gateway, sources[3], 0.3, model="tuned", stream=True)
    chunks = [chunk async for chunk in stream]
    written = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(written) == alone.choices[0].message.content
    assert {chunk.source for chunk in chunks} == {"student", "teacher"}


async def test_an_adapter_may_be_loaded_and_unloaded_while_both_serve(
    adapted: Adapted, gateway: AsyncOpenAI, stock: AsyncOpenAI, sources: list[str]
) -> None:
    async with httpx.AsyncClient(timeout=PATIENCE) as http:

        async def change(url: str, what: str, **more: str) -> None:
            body = {"lora_name": "late"} | more
            (await http.post(f"{url}/v1/{what}_lora_adapter", json=body)).raise_for_status()

        here, there = adapted.serving.gateway, adapted.serving.teacher
        assert (await http.post(f"{here}/v1/chat/completions", json={"model": "late"})).status_code >= 400
        await change(here, "load", lora_path=str(adapted.late))
        alone = ids(await chat(gateway, sources[4], 0, model="late"))
        base = ids(await own(stock, sources[4], "teacher"))
        assert alone != base
        assert ids(await chat(gateway, sources[4], 1, model="late")) == base
        await change(there, "load", lora_path=str(adapted.late))
        assert ids(await own(stock, sources[4], "late")) == alone
        for _ in range(120):  # until the next probe of the teacher has seen the adapter
            found = ids(await chat(gateway, sources[4], 1, model="late"))
            if found == alone:
                break
        assert found == alone
        await change(there, "unload")
        reply = await chat(gateway, sources[4], 1, model="late")
        assert ids(reply) == base
        assert (reply.teacher["degraded"], reply.teacher["rate"]) == (False, 1)
        await change(here, "unload")
