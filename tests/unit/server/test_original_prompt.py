"""What a teacher with another template makes its prompt of: messages and texts as they came."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from vllm.renderers import ChatParams, TokenizeParams

from server.original_prompt import OriginalPrompt, plain
from server.teacher.translation import untranslatable
from server.vllm_api import SamplingParams, keep_originals

MESSAGES = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def of_messages(chat: ChatParams, tokenizing: TokenizeParams | None = None) -> OriginalPrompt:
    tokenizing = tokenizing or TokenizeParams(max_total_tokens=100, add_special_tokens=False)
    return OriginalPrompt.of_messages(MESSAGES, chat, tokenizing, default_template="ours")


def test_messages_tools_and_arguments_are_the_teachers_too() -> None:
    arguments = {
        "tools": [TOOL],
        "add_generation_prompt": False,
        "continue_final_message": True,
        "reasoning_effort": "low",
        "tokenize": False,
    }
    original = of_messages(ChatParams(chat_template="ours", chat_template_kwargs=arguments))
    assert original.body == {
        "messages": MESSAGES,
        "tools": [TOOL],
        "add_generation_prompt": False,
        "continue_final_message": True,
        "add_special_tokens": False,
        "chat_template_kwargs": {"reasoning_effort": "low"},
    }
    assert original.obstacle is None


@pytest.mark.parametrize(
    ("chat", "truncated", "obstacle"),
    [
        (ChatParams(chat_template="theirs"), None, "chat_template"),
        (ChatParams("ours", chat_template_kwargs={"chat_template": "theirs"}), None, "chat_template"),
        (ChatParams("ours"), 7, "truncate_prompt_tokens"),
    ],
)
def test_what_the_student_alone_reads_is_named(
    chat: ChatParams, truncated: int | None, obstacle: str
) -> None:
    original = of_messages(chat, TokenizeParams(max_total_tokens=100, truncate_prompt_tokens=truncated))
    assert untranslatable(original, SamplingParams()) == obstacle


def test_a_prompt_that_was_never_text_is_named() -> None:
    assert untranslatable(None, SamplingParams()) == "prompt"


@pytest.mark.parametrize(
    "given",
    [
        {"logprobs": 0},
        {"logit_bias": {1: 1.0}},
        {"allowed_token_ids": [1]},
        {"frequency_penalty": 0.1},
        {"presence_penalty": 0.1},
    ],
)
def test_parameters_that_speak_of_ids_are_named(given: dict[str, Any]) -> None:
    original = OriginalPrompt({})
    assert untranslatable(original, SamplingParams(**given)) == next(iter(given))


def test_other_parameters_cross() -> None:
    params = SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        seed=1,
        stop=["x"],
        stop_token_ids=[1],
        ignore_eos=True,
        bad_words=["x"],
        repetition_penalty=1.1,
        min_tokens=2,
    )
    assert untranslatable(OriginalPrompt({}), params) is None


def test_classes_and_iterators_become_json() -> None:
    def calls() -> Iterator[dict[str, str]]:
        yield {"id": "1"}

    value = plain([{"role": "assistant", "tool_calls": calls(), "content": None}])
    assert value == [{"role": "assistant", "tool_calls": [{"id": "1"}], "content": None}]
    assert msgspec.json.encode(value)


async def test_the_renderer_tells_what_every_prompt_was() -> None:
    noted: list[tuple[Any, OriginalPrompt]] = []

    async def render_chat(conversations: Any, chat: Any, tokenizing: Any = None, **_: Any) -> Any:
        return conversations, [{"prompt_token_ids": [1]} for _ in conversations]

    async def render_text(prompts: Any, tokenizing: Any = None, **_: Any) -> Any:
        return [{"prompt_token_ids": [2]} for _ in prompts]

    renderer = SimpleNamespace(render_chat_async=render_chat, render_cmpl_async=render_text)
    keep_originals(renderer, "ours", lambda prompt, original: noted.append((prompt, original)))
    tokenizing = TokenizeParams(max_total_tokens=100)
    _, (chat,) = await renderer.render_chat_async([MESSAGES], ChatParams("ours"), tokenizing)
    text, ids = await renderer.render_cmpl_async([{"prompt": "Hi"}, {"prompt_token_ids": [3]}], tokenizing)
    assert [prompt is rendered for (prompt, _), rendered in zip(noted, (chat, text), strict=True)] == [
        True
    ] * 2
    assert noted[0][1].body["messages"] == MESSAGES
    assert noted[1][1].body == {"prompt": "Hi", "add_special_tokens": True}
    assert ids == {"prompt_token_ids": [2]}
