"""Compares two tokenizers: every id, every special token, and how they split text.

A pair exchanges token ids, so one id with two meanings spoils everything after it. The ways of splitting text
may differ: the student's tokenizer splits all text, and the teacher reads its ids. But a teacher that would
split or begin the text in another way reads sequences that it was not trained on. So there is a warning.

A `Question` is put to the other tokenizer, by HTTP or in process. It holds the answer of our own tokenizer.
Bodies and answers are those of vLLM's ``/detokenize`` and ``/tokenize``.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import Any, NamedTuple, Protocol

IDS = 32_768
"""Number of token ids in one question."""

MIXED = 20_000
"""Number of tokens whose texts are joined, to see how the result is split."""

CHARACTERS = 65_536
"""Number of characters in one question about text."""

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "Preis: 1.234,56 € am 31.12.2024 um 17:45 Uhr",
    " leading and  double  spaces\n\nand\ttabs\r\n   \n",
    "üäöß ÜÄÖ éèê 你好 привет 🙂 👩‍🚀",
    "e\u0301 \u1e9b\u0323 \ufb01 \uff21\uff22 \u00a0 \u2028 \u3000 \u200b",  # what a normaliser changes
    "{\"json\": [1, 2, 3], 'code': x += 1}",
    "IT'S it's don't DON'T 1234567890 3.14159",
)

CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
"""Some versions of `transformers` take the first space out of these when they decode, others do not."""

UNKNOWN = "\ufffd"

OTHER_SPLIT = "would split text differently from the student, whose token ids it reads"
"""Warning about a teacher that answers differently to a question that is not binding."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of tokens such as the end of a sequence."""

    def get_vocab(self) -> dict[str, int]:
        """The id of every token, added tokens included."""

    def decode(self, token_ids: list[int]) -> str:
        """The ids as text."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The text as ids."""


class Context(NamedTuple):
    """Ids before and after a token that is a part of a character: together they are whole characters."""

    before: list[int]
    after: list[int]


ALONE = Context([], [])


class Question(Protocol):
    """A question that every tokenizer of the same vocabulary answers as ours does."""

    @property
    def path(self) -> str:
        """Path of the request that puts the question to a server."""

    @property
    def optional(self) -> bool:
        """Whether a server may refuse to answer."""

    @property
    def binding(self) -> bool:
        """Whether a different answer means another vocabulary; if not, it leads to a warning."""

    @property
    def body(self) -> dict[str, Any]:
        """Body of that request."""

    def answered_by(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The answer of a tokenizer in this process."""

    def difference(self, answer: Mapping[str, Any]) -> str | None:
        """What is different "there" and "here", as the middle of a sentence; None if nothing is."""


@dataclass(frozen=True)
class IdsQuestion:
    """A question about the texts of some ids."""

    ids: Sequence[int]
    sequence: list[int]
    """The ids with their contexts, and the separator after each."""
    separator: str
    separator_id: int
    texts: list[str]
    """Text of each id with its context, by our tokenizer."""
    optional: bool = False
    path: str = "/detokenize"
    binding: bool = True

    @property
    def body(self) -> dict[str, Any]:
        """Body of a request for the text of all ids at once."""
        return {"tokens": self.sequence}

    def answered_by(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The text by a tokenizer in this process."""
        return {"prompt": tokenizer.decode(self.sequence)}

    def difference(self, answer: Mapping[str, Any]) -> str | None:
        """The first id whose text differs."""
        text = answer.get("prompt")
        if not isinstance(text, str):
            return "the ids have no text there"
        theirs = text.split(self.separator)[:-1]
        if self.ids and len(theirs) < len(self.ids) / 2:
            return f"the token {self.separator_id} is {self.separator!r} here and not there"
        if len(theirs) != len(self.ids):
            return f"{len(self.ids)} tokens from {self.ids[0]} on are other texts there and here"
        if theirs == self.texts or theirs == cleaned(self.texts) or cleaned(theirs) == self.texts:
            return None
        for token_id, their, our in zip(self.ids, theirs, self.texts, strict=True):
            if their != our:
                return f"the token {token_id} is {their!r} there and {our!r} here"
        return None


@dataclass(frozen=True)
class TextQuestion:
    """A question about the ids into which a text is split."""

    text: str
    ids: list[int]
    """Ids of the text, by our tokenizer."""
    add_special_tokens: bool = False
    optional: bool = False
    path: str = "/tokenize"
    binding: bool = False

    @property
    def body(self) -> dict[str, Any]:
        """Body of a request for the ids of one text."""
        return {"prompt": self.text, "add_special_tokens": self.add_special_tokens}

    def answered_by(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The ids by a tokenizer in this process."""
        return {"tokens": tokenizer.encode(self.text, add_special_tokens=self.add_special_tokens)}

    def difference(self, answer: Mapping[str, Any]) -> str | None:
        """The place at which the two splits begin to differ."""
        theirs = answer.get("tokens")
        if theirs == self.ids:
            return None
        if not isinstance(theirs, list):
            return "texts have no ids there"
        same = _common(theirs, self.ids)
        if len(self.text) <= max(map(len, PROBES)):
            what = repr(self.text)
        else:
            what = f"a text of {len(self.text)} characters"
        special = " with special tokens" if self.add_special_tokens else ""
        here = self.ids[same : same + 8]
        there = theirs[same : same + 8]
        return f"{what} is{special}, after {same} tokens that agree, {there} there and {here} here"


def questions(tokenizer: Tokenizer, rows: int = 0) -> list[Question]:
    """All questions for another tokenizer.

    Args:
        tokenizer: our tokenizer.
        rows: ids below this number that are no tokens of ours must be no tokens of the other tokenizer.

    Raises:
        ValueError: no token's text can separate the texts of the others.
    """
    vocabulary = tokenizer.get_vocab()
    known = sorted(set(vocabulary.values()))
    contexts = _contexts(tokenizer, vocabulary)
    separators = list(_separators(tokenizer, vocabulary))
    asked: list[Question] = []
    texts: dict[int, str] = {}
    for start in range(0, len(known), IDS):
        question = _ids_question(tokenizer, known[start : start + IDS], contexts, separators)
        texts.update(zip(question.ids, question.texts, strict=True))
        asked.append(question)
    if nobodys := sorted(set(range(rows)) - set(known)):
        asked.append(_ids_question(tokenizer, nobodys, {}, separators, optional=True))
    asked += _text_questions(tokenizer, texts)
    return asked


class Differences(NamedTuple):
    """The first differences between two tokenizers, each phrased as the middle of a sentence."""

    ids: str | None = None
    """The first difference in an id, with which the two models are no pair."""
    texts: str | None = None
    """The first text that the two tokenizers split or begin in different ways."""


def differences(ours: Tokenizer, theirs: Tokenizer) -> Differences:
    """The differences between two tokenizers in this process."""
    here = ours.get_vocab().keys()
    there = theirs.get_vocab().keys()
    if here != there:
        token = min(here ^ there)
        return Differences(ids=f"{token!r} is a token {'here' if token in here else 'there'} only")
    found = Differences()
    for question in questions(ours):
        problem = question.difference(question.answered_by(theirs))
        if problem and question.binding:
            return Differences(ids=problem)
        if problem and found.texts is None:
            found = Differences(texts=problem)
    return found


def cleaned(texts: Sequence[str]) -> list[str]:
    """Texts as `transformers` cleans them up."""
    result = []
    for text in texts:
        for phrase in CLEANED:
            text = text.replace(phrase, phrase.strip())
        result.append(text)
    return result


def _ids_question(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    contexts: Mapping[int, Context],
    separators: Sequence[int],
    *,
    optional: bool = False,
) -> IdsQuestion:
    for separator in separators:
        shown = [token_id for token_id in ids if token_id != separator]
        text = tokenizer.decode([separator])
        sequence: list[int] = []
        for token_id in shown:
            context = contexts.get(token_id, ALONE)
            sequence += [*context.before, token_id, *context.after, separator]
        *texts, rest = tokenizer.decode(sequence).split(text)
        if len(texts) == len(shown) and not rest:
            return IdsQuestion(shown, sequence, text, separator, texts, optional)
    raise ValueError("no token can tell the others apart")


def _separators(tokenizer: Tokenizer, vocabulary: Mapping[str, int]) -> Iterator[int]:
    """Ids whose text is likely to be in no other token: special ones, then long ones."""
    longest = nlargest(20, vocabulary, key=len)
    for token_id in [*tokenizer.all_special_ids, *map(vocabulary.__getitem__, longest)]:
        if tokenizer.decode([token_id]).strip():
            yield token_id


def _text_questions(tokenizer: Tokenizer, texts: Mapping[int, str]) -> list[TextQuestion]:
    """Questions about the probes, every special token amid text, and many mixed tokens, whose merges meet."""
    special_ids = set(tokenizer.all_special_ids)
    special: list[str] = []
    plain: list[str] = []
    for token_id, text in sorted(texts.items()):
        if token_id in special_ids:
            special.append(text)
        elif UNKNOWN not in text:
            plain.append(text)
    random.Random(0).shuffle(plain)
    mixed = "".join(plain[:MIXED])
    asked = [*PROBES, f"b{' a '.join(special)}c"]
    for start in range(0, len(mixed), CHARACTERS):
        asked.append(mixed[start : start + CHARACTERS])
    questions = []
    for text in asked:
        questions.append(TextQuestion(text, tokenizer.encode(text, add_special_tokens=False)))
    with_special = tokenizer.encode(PROBES[0], add_special_tokens=True)
    return [*questions, TextQuestion(PROBES[0], with_special, add_special_tokens=True)]


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common prefix of two sequences."""
    shorter = min(len(left), len(right))
    for position in range(shorter):
        if left[position] != right[position]:
            return position
    return shorter


def _contexts(tokenizer: Tokenizer, vocabulary: Mapping[str, int]) -> dict[int, Context]:
    """The context of every token that is a part of a character: alone, all these tokens look alike."""
    spelled = _byte_level(vocabulary) if _is_byte_level(tokenizer, vocabulary) else _byte_fallback(vocabulary)
    ids: dict[int, int] = {}  # tokens that are one byte, by that byte
    for token_id, content in spelled.items():
        if len(content) == 1:
            ids[content[0]] = token_id
    contexts: dict[int, Context] = {}
    for token_id, content in spelled.items():
        if _is_text(content):
            continue
        missing = _completion(content)
        if missing is not None and ids.keys() >= {*missing.before, *missing.after}:
            before = [ids[byte] for byte in missing.before]
            after = [ids[byte] for byte in missing.after]
            contexts[token_id] = Context(before, after)
    return contexts


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


class _Missing(NamedTuple):
    """Bytes that make whole characters of a part of UTF-8."""

    before: bytes
    after: bytes


def _completion(content: bytes) -> _Missing | None:
    """The bytes missing before and after a part of UTF-8; None if none make characters of it."""
    following = len(content) - len(content.lstrip(bytes(range(0x80, 0xC0))))
    before = {0: b"", 1: b"\xc2", 2: b"\xe1", 3: b"\xf1"}.get(following, b"")
    for after in (b"", b"\x80", b"\xa0", b"\x90", b"\x80\x80", b"\xa0\x80", b"\x90\x80\x80", b"\x80\x80\x80"):
        if _is_text(before + content + after):
            return _Missing(before, after)
    return None


def _is_byte_level(tokenizer: Tokenizer, vocabulary: Mapping[str, int]) -> bool:
    return "\u0120" in vocabulary and tokenizer.decode([vocabulary["\u0120"]]) == " "


def _byte_level(vocabulary: Mapping[str, int]) -> dict[int, bytes]:
    """Bytes of each token that is not ASCII. GPT-2's tokenizer writes each byte as one character."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    byte_of = dict(enumerate(others, start=256))
    spelled: dict[int, bytes] = {}
    for token, token_id in vocabulary.items():
        if token.isascii():
            continue
        try:
            spelled[token_id] = token.translate(byte_of).encode("latin-1")
        except UnicodeEncodeError:  # an added token, which is written as it is
            continue
    return spelled


def _byte_fallback(vocabulary: Mapping[str, int]) -> dict[int, bytes]:
    """Bytes of the tokens that SentencePiece has for single bytes: ``<0xE4>``."""
    spelled: dict[int, bytes] = {}
    for token, token_id in vocabulary.items():
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
        if byte:
            spelled[token_id] = bytes.fromhex(byte[1])
    return spelled
