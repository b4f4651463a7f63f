"""Files of prompts: the prompts that are read, and the faults that are refused with file and line."""

from pathlib import Path

import pytest

from measuring.chats import Turn
from measuring.json_lines import DataError
from measuring.prompts import load_prompts

CHAT = (Turn("system", "Be brief."), Turn("user", "Why?"))


def written(directory: Path, text: str | bytes, name: str = "prompts.jsonl") -> Path:
    file = directory / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_json_lines_have_a_source_a_prompt_or_messages(tmp_path: Path) -> None:
    chat = '[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]'
    lines = ['{"source": "one", "target": "eins"}', '{"prompt": "two"}', f'{{"messages": {chat}}}']
    file = written(tmp_path, "\n".join([*lines, f'{{"prompt": {chat}}}']) + "\n")
    assert load_prompts(file) == ["one", "two", CHAT, CHAT]


def test_text_has_a_prompt_on_each_line_that_is_not_blank(tmp_path: Path) -> None:
    file = written(tmp_path, "\ufeffWho?\r\n\n  Where to? \u2028 There?\n", "prompts")
    assert load_prompts(file) == ["Who?", "Where to? \u2028 There?"]


def test_a_line_of_text_may_begin_with_a_brace(tmp_path: Path) -> None:
    assert load_prompts(written(tmp_path, "{x} is what?", "prompts.txt")) == ["{x} is what?"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "prompts.jsonl: has no prompt"),
        (b"ab\n\xff", "prompts.jsonl: is not UTF-8 .byte 4"),
        ('{"prompt": "a"}\n{"text": "b"}', r":2: has no 'messages', 'source' or 'prompt'"),
        ('{"prompt": 1}', r":1: 'prompt' is neither a text nor a conversation"),
        ('{"source": "a"}\n{"messages": []}', r":2: 'messages' is not a list of turns"),
        ('{"source": []}', r":1: 'source' is a list, not a string"),
        ('{"messages": [{"content": "a"}]}', r":1: turn 1 of 'messages': the role is None"),
        ('{"prompt": "a"}\nand so on', r":2: is not JSON"),
    ],
)
def test_a_fault_is_named_with_its_line(tmp_path: Path, content: str | bytes, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        load_prompts(written(tmp_path, content))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prompts: No such file"):
        load_prompts(tmp_path / "prompts")
