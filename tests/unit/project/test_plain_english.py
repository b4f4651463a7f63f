"""Documents, docstrings and messages are easy to read: short sentences, and words in their usual sense."""

import ast
import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.http.routes import PLAYGROUND
from tests.helpers.paths import ROOT
from tests.helpers.sources import PACKAGES, SOURCES, docstrings, docstrings_and_comments, parsed

DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
LONGEST = 35
"""Most words of a sentence."""
AVERAGE = 20
WORDS = {
    r"\bbeside\b": "next to, compared with, with",
    r"\bmend(s|ed|ing|ings)?\b": "fix",
    r"\b(says|said|say) so\b": "reports, logs",
    r"\bwhose time has come\b": "due",
    r"\bits grave\b": "plain words",
    r"\bso many\b(?! (as|that))": "this many",
    r"\bso long\b(?! as)": "this long",
}
"""Patterns of words that readers stumble over, and better words."""


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of prose, without code, tables, quotes and headings."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL)
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        item = re.match(r"\s*(?:[-*]|\d+\.) +(.*)", line)
        ends = not line.strip() or line.startswith(("#", "    ", "|", ">", "![", "$", "├", "│", "└"))
        if (ends or item) and lines:
            yield " ".join(lines)
            lines = []
        if item:
            lines = [item[1]]
        elif not ends:
            lines.append(line.strip())


def sentences(text: str) -> Iterator[str]:
    for paragraph in paragraphs(text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "Code", paragraph))
        plain = re.sub(r"\b(e\.g|i\.e|vs)\.", r"\1", re.sub(r"[*_]{1,2}", "", plain))
        yield from re.split(r"(?<=[.!?:])\s+(?=[A-Z0-9\"“(])", plain)


def length(sentence: str) -> int:
    return len(re.findall(r"[\w’'-]+", sentence))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_sentences_are_short(document: Path) -> None:
    found = list(sentences(document.read_text()))
    assert [sentence for sentence in found if length(sentence) > LONGEST] == []
    assert sum(map(length, found)) <= AVERAGE * len(found)


def test_a_long_sentence_is_found() -> None:
    text = "# Title\n\nShort one. A " + "word " * 40 + "end.\n\n| a table | is none |\n"
    assert [length(sentence) for sentence in sentences(text)] == [2, 42]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_use_words_in_their_usual_sense(document: Path) -> None:
    assert wrong_words(document.read_text()) == []


def test_docstrings_and_comments_use_words_in_their_usual_sense() -> None:
    found = []
    for source in SOURCES:
        found += [
            f"{source.relative_to(ROOT)}: {wrong}" for wrong in wrong_words(docstrings_and_comments(source))
        ]
    assert found == []


def explained(docstring: str) -> Iterator[str]:
    """A docstring in parts, with each argument as an item of a list."""
    prose, *sections = re.split(r"\n\n(?=[A-Z]\w+:\n)", inspect.cleandoc(docstring))
    yield prose
    for section in sections:
        yield re.sub(r"\n +(\w+: )?", lambda name: f"\n- {name[1]}" if name[1] else "\n", section)


def test_sentences_of_docstrings_are_short() -> None:
    found = []
    for source in SOURCES:
        for text in itertools.chain.from_iterable(map(explained, docstrings(source))):
            long = [sentence for sentence in sentences(text) if length(sentence) > LONGEST]
            found += [f"{source.relative_to(ROOT)}: {sentence}" for sentence in long]
    assert found == []


LOGGED = ("info", "warning", "error", "exception")


def messages(source: Path) -> Iterator[str]:
    """A module's errors, log lines and help texts, with `Code` in place of inserted values."""
    for node in ast.walk(parsed(source)):
        shown: list[ast.expr] = []
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            shown = node.exc.args
        if isinstance(node, ast.Call):
            shown = [word.value for word in node.keywords if word.arg in ("help", "description", "epilog")]
            if isinstance(node.func, ast.Attribute) and node.func.attr in LOGGED:
                shown += node.args[:1]
        for expression in shown:
            yield filled(expression)


def filled(expression: ast.expr) -> str:
    if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
        return expression.value.replace("%s", "Code")
    if isinstance(expression, ast.JoinedStr):
        return "".join(map(filled, expression.values))
    return "Code"


@pytest.mark.parametrize("package", PACKAGES)
def test_messages_are_short_and_plain(package: str) -> None:
    found = []
    for source in sorted((ROOT / package).rglob("*.py")):
        for message in messages(source):
            long = [sentence for sentence in sentences(message) if length(sentence) > LONGEST]
            found += [f"{source.relative_to(ROOT)}: {problem}" for problem in [*wrong_words(message), *long]]
    assert found == []


def test_messages_of_every_kind_are_found(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        'raise ValueError(f"no {name}")\n'
        'logger.warning("%s is gone", name)\n'
        'parser.add_argument("--port", help="port to listen on")\n'
    )
    assert sorted(messages(source)) == ["Code is gone", "no Code", "port to listen on"]


def test_the_playground_is_plain() -> None:
    assert wrong_words(PLAYGROUND.read_text()) == []


def wrong_words(text: str) -> list[str]:
    found = []
    for pattern, better in WORDS.items():
        for match in re.finditer(pattern, text, re.IGNORECASE):
            place = text[max(0, match.start() - 30) : match.end() + 30]
            found.append(f"{' '.join(place.split())}: write {better}")
    return found
