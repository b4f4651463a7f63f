"""Messages and texts as they came, from which a teacher with another template makes its prompt."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from vllm.renderers import ChatParams, TokenizeParams

from server.original_prompt import OriginalPrompt, begun_with, plain
from server.teacher.translation import untranslatable
from server.vllm_api import SamplingParams, keep_originals

MESSAGES = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def of_messages(chat: ChatParams, tokenizing: TokenizeParams | None = None) -> OriginalPrompt:
    tokenizing = tokenizing or TokenizeParams(max_total_tokens=100, add_special_tokens=False)
    return OriginalPrompt.of_messages(MESSAGES, chat, tokenizing, default_template="ours")


def test_the_teacher_gets_messages_tools_and_arguments() -> None:
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
def test_parts_that_only_the_student_can_read_are_named(
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


async def test_the_renderer_keeps_the_source_of_every_prompt() -> None:
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


async def test_a_prompt_can_be_rendered_again_with_words() -> None:
    noted: list[OriginalPrompt] = []

    async def render_chat(conversations: Any, chat: Any, tokenizing: Any = None, **options: Any) -> Any:
        ids = [{"prompt_token_ids": list(messages[-1]["content"].encode())} for messages in conversations]
        return conversations, ids

    async def render_text(prompts: Any, tokenizing: Any = None, **_: Any) -> Any:
        return [{"prompt_token_ids": list(prompt["prompt"].encode())} for prompt in prompts]

    renderer = SimpleNamespace(render_chat_async=render_chat, render_cmpl_async=render_text)
    keep_originals(renderer, "ours", lambda prompt, original: noted.append(original))
    await renderer.render_chat_async([[{"role": "user", "content": "Hi"}]], ChatParams("ours"))
    await renderer.render_chat_async([[{"role": "assistant", "content": "Hi"}]], ChatParams("ours"))
    await renderer.render_cmpl_async([{"prompt": "Ho"}])
    rendered = [await original.render("At most 5 %. ") for original in noted if original.render]
    assert rendered == [list(b"At most 5 %. Hi"), None, list(b"At most 5 %. Ho")]


async def test_sources_are_not_kept_without_need() -> None:
    async def render_chat(conversations: Any, chat: Any, tokenizing: Any = None, **_: Any) -> Any:
        return conversations, [{"prompt_token_ids": [1]}]

    renderer = SimpleNamespace(render_chat_async=render_chat, render_cmpl_async=render_chat)
    noted: list[Any] = []
    keep_originals(renderer, "ours", lambda *both: noted.append(both), lambda: False)
    assert await renderer.render_chat_async([MESSAGES], ChatParams("ours")) == (
        [MESSAGES],
        [{"prompt_token_ids": [1]}],
    )
    assert noted == []


@pytest.mark.parametrize(
    ("content", "with_words"),
    [
        ("Hi", "W Hi"),
        (None, "W "),
        ([{"type": "text", "text": "Hi"}], [{"type": "text", "text": "W Hi"}]),
        (
            [{"type": "image_url"}, {"type": "text", "text": "Hi"}],
            [{"type": "image_url"}, {"type": "text", "text": "W Hi"}],
        ),
        ([{"type": "image_url"}], [{"type": "text", "text": "W "}, {"type": "image_url"}]),
        (["Hi"], ["W Hi"]),
    ],
)
def test_words_begin_the_text_of_the_users_last_message(content: Any, with_words: Any) -> None:
    messages = [{"role": "user", "content": "before"}, {"role": "assistant", "content": "yes"}]
    messages.append({"role": "user", "content": content})
    changed = begun_with(messages, "W ")
    assert changed == [*messages[:2], {"role": "user", "content": with_words}]
    assert messages[2]["content"] == content
