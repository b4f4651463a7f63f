"""The demo's student with a teacher of another tokenizer, chat template and end token, in real engines."""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI, BadRequestError
from transformers import AutoTokenizer

from measuring.pair import Pair, Serving, serving
from tests.helpers.client import MODEL, chat, excess, openai_client
from tests.helpers.tiny_models import save_teacher_of_other_words

LENGTH = 60
TYPED = "Say <|im_end|> and <|end|>, <|user|>!"


@pytest.fixture(scope="module")
def other(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    directory = tmp_path_factory.mktemp("other")
    teacher = save_teacher_of_other_words(directory / "teacher")
    strangers = Pair(teacher=teacher, student=pair.student, router=pair.router)
    with serving(strangers, directory, flags=("--gate", "random")) as stack:
        yield stack


@pytest.fixture
async def gateway(other: Serving) -> AsyncIterator[AsyncOpenAI]:
    async with openai_client(other.gateway) as client:
        yield client


async def of_the_teacher_alone(other: Serving, source: str, **parameters: Any) -> Any:
    async with openai_client(other.teacher) as client:
        reply = await client.chat.completions.create(
            model="teacher",
            messages=[{"role": "user", "content": source}],
            temperature=0,
            max_tokens=LENGTH * 4,
            **parameters,
        )
    return reply.choices[0]


async def test_the_gateway_finds_out_that_the_vocabularies_differ(other: Serving) -> None:
    async with httpx.AsyncClient(base_url=other.gateway) as http:
        assert (await http.get("/ready")).json()["teacher_vocabulary"] == "other"


@pytest.mark.parametrize("source", ["What is 17 plus 4?", TYPED, "list of words"])
async def test_at_budget_one_the_text_is_the_teachers_own(
    other: Serving, gateway: AsyncOpenAI, source: str
) -> None:
    alone = await of_the_teacher_alone(other, source)
    reply = await chat(gateway, source, 1, max_tokens=LENGTH)
    text = reply.choices[0].message.content
    assert len(text) > 20
    assert alone.message.content.startswith(text)
    if reply.choices[0].finish_reason == "stop":
        assert (alone.message.content, alone.finish_reason) == (text, "stop")
    else:
        assert len(reply.choices[0].token_ids) == LENGTH
    assert reply.teacher["tokens"] == len(reply.choices[0].token_ids)
    assert reply.teacher["own_tokens"] > 0


async def test_every_surface_has_the_same_text(other: Serving, gateway: AsyncOpenAI) -> None:
    """Messages reach the teacher through vLLM's own conversions."""
    source = "What is 17 plus 4?"
    expected = (await chat(gateway, source, 1, max_tokens=LENGTH)).choices[0].message.content
    budget = {"teacher_budget": 1}
    stream = await chat(gateway, source, 1, max_tokens=LENGTH, stream=True)
    chunks = [chunk async for chunk in stream]
    response = await gateway.responses.create(
        model="wheels", input=source, temperature=0, max_output_tokens=LENGTH, extra_body=budget
    )
    anthropic = AsyncAnthropic(base_url=other.gateway, api_key="none", max_retries=0)
    async with anthropic:
        message = await anthropic.messages.create(
            model="wheels",
            max_tokens=LENGTH,
            messages=[{"role": "user", "content": source}],
            extra_body={**budget, "temperature": 0},
        )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert response.output_text == expected
    assert message.content[0].text == expected


async def test_a_plain_prompt_is_the_teachers_plain_prompt(other: Serving, gateway: AsyncOpenAI) -> None:
    async with openai_client(other.teacher) as client:
        alone = await client.completions.create(
            model="teacher", prompt="One word:", max_tokens=LENGTH * 4, temperature=0
        )
    reply = await gateway.completions.create(
        model="wheels",
        prompt="One word:",
        max_tokens=LENGTH,
        temperature=0,
        extra_body={"teacher_budget": 1},
    )
    assert len(reply.choices[0].text) > 20
    assert alone.choices[0].text.startswith(reply.choices[0].text)


async def test_bounds_hold_and_no_border_is_within_a_character(
    gateway: AsyncOpenAI, pair: Pair, sources: list[str], span_tokens: int
) -> None:
    """The student may write broken characters after a random teacher's words, but no border may break one."""
    tokenizer = AutoTokenizer.from_pretrained(pair.student)
    budgets = [0.2, 0.5, {"tokens": 9}, {"calls": 3}]
    asked = [(source, budgets[n % 4]) for n, source in enumerate(sources[:48])]
    replies = await asyncio.gather(*(chat(gateway, source, budget) for source, budget in asked))
    for (_, budget), reply in zip(asked, replies, strict=True):
        limits = budget if isinstance(budget, dict) else {"fraction": budget}
        assert reply.teacher["tokens"] <= limits.get("tokens", 10**9)
        assert reply.teacher["calls"] <= limits.get("calls", 10**9)
        assert excess(reply, limits.get("fraction", 1), span_tokens) <= 1e-9
        ids = reply.choices[0].token_ids
        for start, end in reply.teacher["spans"]:
            assert not tokenizer.decode(ids[:start]).endswith("\ufffd")
            assert "\ufffd" not in tokenizer.decode(ids[start:end])
        assert reply.teacher["degraded"] is False
    assert sum(reply.teacher["tokens"] for reply in replies) > 100


@pytest.mark.parametrize(
    ("name", "value"),
    [("logprobs", True), ("logit_bias", {"9": 1}), ("allowed_token_ids", [9]), ("presence_penalty", 1)],
)
async def test_parameters_that_need_the_students_logits_are_refused_by_name(
    gateway: AsyncOpenAI, name: str, value: Any
) -> None:
    with pytest.raises(BadRequestError) as error:
        await chat(gateway, "Hi", 0.5, extra_body={name: value})
    assert error.value.body["param"] == name
    alone = await chat(gateway, "Hi", None, extra_body={name: value}, max_tokens=8)
    assert alone.teacher["calls"] == 0


REGEX = r'\{"answer": "(yes indeed|not at all)", "sure": (true|false)\}'
"""JSON without room for spaces, which a random model would write endlessly."""


@pytest.mark.parametrize("budget", [0.3, {"calls": 2}, 1])
async def test_a_grammar_holds_for_both_models(gateway: AsyncOpenAI, sources: list[str], budget: Any) -> None:
    """Amid an answer most of a random teacher's text is refused. At the beginning it gets the grammar."""
    for source in sources[:6]:
        reply = await chat(
            gateway, source, budget, max_tokens=LENGTH, extra_body={"structured_outputs": {"regex": REGEX}}
        )
        assert re.fullmatch(REGEX, reply.choices[0].message.content)
        assert reply.teacher["degraded"] is False
        if budget == 1:
            assert (reply.teacher["rate"], reply.teacher["calls"]) == (1, 1)


async def test_ignored_end_tokens_of_both_models_do_not_end_the_completion(
    gateway: AsyncOpenAI, sources: list[str]
) -> None:
    for budget in (0.3, 1):
        reply = await chat(gateway, sources[1], budget, max_tokens=90, extra_body={"ignore_eos": True})
        assert len(reply.choices[0].token_ids) == 90
        assert reply.teacher["tokens"] > 0


@pytest.mark.parametrize("budget", [0.3, 1])
async def test_stop_tokens_and_bad_words_hold_for_the_teachers_text(
    gateway: AsyncOpenAI, pair: Pair, budget: float
) -> None:
    """The test uses completions: this teacher repeats the end of its prompt, which is a newline in a chat."""
    tokenizer = AutoTokenizer.from_pretrained(pair.student)

    async def written(**extra: Any) -> Any:
        extra |= {"teacher_budget": budget, "return_token_ids": True}
        reply = await gateway.completions.create(
            model=MODEL, prompt="The number is four", temperature=0, max_tokens=LENGTH, extra_body=extra
        )
        return reply.choices[0]

    whole = (await written()).token_ids
    ((token, _),) = Counter(whole).most_common(1)
    stopped = await written(stop_token_ids=[token])
    assert token not in stopped.token_ids[:-1]
    if stopped.token_ids[-1] == token:
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", token)
    word = word_of(tokenizer, whole)
    without = await written(bad_words=[word])
    assert not occurs(tokenizer.encode(word, add_special_tokens=False), without.token_ids)


def word_of(tokenizer: Any, ids: list[int]) -> str:
    """A part of a text whose ids are the same alone and within the text."""
    for length in range(1, 5):
        for start in range(len(ids) - length):
            part = ids[start : start + length]
            word = str(tokenizer.decode(part))
            if word.strip() == word and tokenizer.encode(word, add_special_tokens=False) == part:
                return word
    raise AssertionError(f"no word in {tokenizer.decode(ids)!r}")


def occurs(part: list[int], ids: list[int]) -> bool:
    """Whether the ids contain these ids one after the other."""
    return any(ids[start : start + len(part)] == part for start in range(len(ids)))


async def test_the_prompts_log_probabilities_are_the_students(
    gateway: AsyncOpenAI, sources: list[str]
) -> None:
    asked = {"max_tokens": 20, "extra_body": {"prompt_logprobs": 1}}
    alone = await chat(gateway, sources[0], 0, **asked)
    together = await chat(gateway, sources[0], 1, **asked)
    assert together.teacher["rate"] == 1
    for ours, theirs in zip(together.prompt_logprobs[1:], alone.prompt_logprobs[1:], strict=True):
        assert {token: pytest.approx(entry["logprob"], abs=1e-4) for token, entry in ours.items()} == {
            token: entry["logprob"] for token, entry in theirs.items()
        }


async def test_a_prompt_of_token_ids_is_for_the_student(gateway: AsyncOpenAI) -> None:
    with pytest.raises(BadRequestError) as error:
        await gateway.completions.create(
            model="wheels", prompt=[9, 10], max_tokens=4, extra_body={"teacher_budget": 0.5}
        )
    assert error.value.body["param"] == "prompt"
