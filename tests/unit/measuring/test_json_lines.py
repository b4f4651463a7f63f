"""Data files: the lines that are read, and the faults that are refused with file and line."""

import json
from pathlib import Path

import pytest

from measuring.examples import load_examples, load_sources
from measuring.json_lines import DataError, read_json_lines
from server.config import ConfigError, load
from training.tasks import make_task

GOOD = b'{"source": "a", "target": "b"}'


def written(directory: Path, content: bytes) -> Path:
    file = directory / "data.jsonl"
    file.write_bytes(content)
    return file


def test_a_line_ends_where_a_line_ends_and_nowhere_else(tmp_path: Path) -> None:
    """Some characters count as line ends for Python's `splitlines`, and may be inside a JSON string."""
    text = "a\u2028b\u2029c\x85d"
    line = json.dumps({"source": text}, ensure_ascii=False)
    assert load_sources(written(tmp_path, f"{line}\n{line}\r\n".encode())) == [text, text]


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n \n"])
def test_blank_lines_at_the_end_are_fine(tmp_path: Path, end: bytes) -> None:
    rows = read_json_lines(written(tmp_path, GOOD + b"\n" + GOOD + end))
    assert [row.number for row in rows] == [1, 2]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (GOOD + b"\n\n" + GOOD, ":2: is blank"),
        (GOOD + b"\n{\n", ":2: is not JSON"),
        (GOOD + b"\n" + GOOD + GOOD, ":2: is not JSON .Extra data"),
        (b"\xef\xbb\xbf" + GOOD, ":1: starts with a byte order mark"),
        (GOOD + b'\n{"source": "\xff"}', ":2: is not UTF-8"),
        (GOOD.decode().encode("utf-16"), ":1: is not UTF-8"),
        (GOOD + b"\n[1]", ":2: is a list, not an object"),
        (GOOD + b"\nnull", ":2: is null, not an object"),
        (b'{"source": NaN}', ":1: is not JSON that can be read .NaN"),
        (b'{"source": -Infinity}', ":1: is not JSON that can be read .-Infinity"),
        (b"[" * 100_000, ":1: is not JSON"),
        (b'{"source": ' + b"1" * 10_000 + b"}", ":1: is not JSON that can be read"),
    ],
)
def test_an_unreadable_line_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    with pytest.raises(DataError, match=rf"data\.jsonl{problem}") as caught:
        read_json_lines(written(tmp_path, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_holds_no_example(tmp_path: Path, content: bytes) -> None:
    file = written(tmp_path, content)
    assert load_sources(file) == []
    with pytest.raises(DataError, match=r"data\.jsonl: is empty"):
        load_examples(file)
    with pytest.raises(DataError, match=r"data\.jsonl: is empty"):
        make_task("jsonl", train=str(file), valid=str(file), test=str(file))


@pytest.mark.parametrize("place", ["nowhere.jsonl", "."])
def test_a_missing_file_is_named(tmp_path: Path, place: str) -> None:
    with pytest.raises(DataError, match=r"No such file|Is a directory"):
        read_json_lines(tmp_path / place)


VALUES = [
    ("null", "null"),
    ("1", "a number"),
    ("2.5", "a number"),
    ("true", "a boolean"),
    ("[]", "a list"),
    ('{"a": 1}', "an object"),
]


@pytest.mark.parametrize("field", ["source", "target"])
@pytest.mark.parametrize(("value", "kind"), VALUES)
def test_source_and_target_are_strings(tmp_path: Path, field: str, value: str, kind: str) -> None:
    fields = {"source": '"a"', "target": '"b"'} | {field: value}
    line = "{" + ", ".join(f'"{name}": {text}' for name, text in fields.items()) + "}"
    file = written(tmp_path, GOOD + b"\n" + line.encode())
    with pytest.raises(DataError, match=rf"data\.jsonl:2: '{field}' is {kind}, not a string"):
        make_task("jsonl", train=str(file), valid=str(file), test=str(file))


@pytest.mark.parametrize("field", ["source", "target"])
def test_half_a_surrogate_pair_is_refused(tmp_path: Path, field: str) -> None:
    line = json.dumps({"source": "a", "target": "b"} | {field: "\ud83d"})
    file = written(tmp_path, line.encode())
    with pytest.raises(DataError, match=rf":1: '{field}' holds half of a surrogate pair"):
        make_task("jsonl", train=str(file), valid=str(file), test=str(file))
    whole = json.dumps({"source": "\U0001f600"})  # two escapes, one character
    assert load_sources(written(tmp_path, whole.encode())) == ["\U0001f600"]


@pytest.mark.parametrize("references", ["null", "[]", "[[[]]]", '[[["a", 1]]]', '"a"', '[[["\\ud83d"]]]'])
def test_right_answers_are_forms_of_slots_of_alternatives(tmp_path: Path, references: str) -> None:
    line = f'{{"source": "a", "references": {references}}}'
    with pytest.raises(DataError, match=r"data\.jsonl:1: 'references' must be"):
        load_examples(written(tmp_path, line.encode()))


def test_training_data_that_is_all_held_out_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD)
    with pytest.raises(DataError, match="every training source is in"):
        make_task("jsonl", train=str(file), valid=str(file), test=str(file))


def test_the_gateway_refuses_the_playgrounds_file_before_it_starts(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD + b'\n{"source": 3}')
    with pytest.raises(ConfigError, match=r"examples: .*data\.jsonl:2: 'source' is a number"):
        load(["--student", str(tmp_path), "--teacher", "http://127.0.0.1:9", "--examples", str(file)])
