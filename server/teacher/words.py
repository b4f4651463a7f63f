"""Tokenizes text that continues other text; names of special tokens in it never become special tokens.

The ids of a text's parts, one after the other, are ids of the whole text. So a completion can grow by text of
either model. Some tokenizers put something before every text (SentencePiece: a space), which would then be
in the middle. So a part is encoded after a *lead*, whose ids are left out.
"""

import asyncio
import copy
import re
import unicodedata
from collections.abc import Awaitable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from router.errors import UnusableInput
from router.vocabulary import PROBES, Tokenizer
from server.teacher.errors import TeacherError
from server.vllm_api import TokenizerLike

LEADS = ("", "\n", "a", ".")
"""Leads that a text may be encoded after; the first one that works is used."""

STARTS = ("x", " x", ".", "\n", "9", "The", "  x")
"""Beginnings of texts that have to fit after another text."""

BASE = "Hello"

LIKELY_SPECIAL = re.compile(r"[^\w\s].*\w.*[^\w\s]", re.DOTALL)
"""Matches names of special tokens, such as ``</s>``, ``<|im_end|>`` and ``[INST]``, and some other texts."""


class UnusableTokenizer(UnusableInput):
    """A tokenizer that changes texts, or cannot continue one."""


class SpecialStrings:
    """Names of special tokens, which a tokenizer would turn into the tokens wherever it finds them."""

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._strings: set[str] = set()
        self._pattern: re.Pattern[str] | None = None
        self.add(strings)

    def add(self, strings: Iterable[str]) -> bool:
        """Add further names; returns whether any of them is new."""
        new = {string for string in strings if len(string) > 1} - self._strings
        if not new:
            return False
        self._strings |= new
        longest_first = sorted(self._strings, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))
        return True

    def cut(self, text: str) -> list[str]:
        """Split a text into parts without such names: each name is cut after its first character."""
        parts: list[str] = []
        while self._pattern is not None and (match := self._pattern.search(text)):
            border = match.start() + 1
            parts.append(text[:border])
            text = text[border:]
        return [*parts, text] if text else parts


class Encoded(NamedTuple):
    """Token ids, and the text that they stand for."""

    ids: list[int]
    text: str


class StudentWords:
    """The student's tokenizer, in this process."""

    def __init__(self, tokenizer: TokenizerLike) -> None:
        """``tokenizer``: the tokenizer of the student's engine, of which a copy is used.

        Raises:
            UnusableTokenizer: the tokenizer changes texts, or cannot continue one.
        """
        self._tokenizer: Tokenizer = copy.deepcopy(tokenizer)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {token_id: str(token) for token_id, token in added.items() if token.special}
        special.update(zip(tokenizer.all_special_ids, map(str, tokenizer.all_special_tokens), strict=True))
        self._special_ids = frozenset(special)
        self._specials = SpecialStrings(special.values())
        self._lead = self._find_lead()
        self._lead_ids = self._raw(self._lead)
        self._lead_text = self._plain(self._lead_ids)
        if self.encode(PROBES[0]).text != PROBES[0] or self.decode(self._ids(PROBES[0])) != PROBES[0]:
            raise UnusableTokenizer(f"the student's tokenizer changes {PROBES[0]!r}")

    def encode(self, text: str) -> Encoded:
        """The ids of a text, up to the first character that the student has no token for."""
        ids = self._ids(text)
        if self._keeps(text, ids):
            return Encoded(ids, text)
        for place, character in enumerate(text):
            if not self._keeps(character, self._ids(character)):
                return Encoded(self._ids(text[:place]), text[:place])
        return Encoded(ids, text)

    def decode(self, ids: list[int]) -> str:
        """The text of ids that come after other ids."""
        return self._plain([*self._lead_ids, *ids])[len(self._lead_text) :]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._specials.cut(text):
            ids += self._raw(self._lead + part)[len(self._lead_ids) :]
        return ids

    def _keeps(self, text: str, ids: list[int]) -> bool:
        """Whether ids stand for a text or its normal form; special tokens, such as an unknown one, do not."""
        if not self._special_ids.isdisjoint(ids):
            return False
        decoded = self.decode(ids)
        return decoded == text or same_characters(decoded, text)

    def _find_lead(self) -> str:
        base = self._raw(BASE)
        for lead in LEADS:
            lead_ids = self._raw(lead)
            for start in STARTS:
                ids = self._raw(lead + start)
                known = self._special_ids.isdisjoint(ids)
                if ids[: len(lead_ids)] != lead_ids:
                    break
                if known and self._plain([*base, *ids[len(lead_ids) :]]) != BASE + start:
                    break
            else:
                return lead
        raise UnusableTokenizer("the student's tokenizer cannot continue a text")

    def _raw(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False)) if text else []

    def _plain(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


class AsksTokenizer(Protocol):
    """Puts a question to ``/tokenize`` or ``/detokenize`` of a server."""

    def __call__(self, path: str, body: dict[str, Any], /) -> Awaitable[dict[str, Any]]:
        """The server's answer, decoded from JSON."""


class TeacherWords:
    """The teacher's tokenizer, through a stock server's ``/tokenize``.

    A stock server turns names of special tokens into the tokens, and does not report the names. So if a
    token's text looks like such a name, it is cut, and the text is encoded again.
    """

    def __init__(self) -> None:
        self._specials = SpecialStrings()
        self._lead = ""
        self._lead_ids: list[int] = []

    async def prepare(self, ask: AsksTokenizer) -> None:
        """Find the lead after which the teacher's tokenizer continues a text.

        Raises:
            UnusableTokenizer: there is no such lead.
        """
        base = await _tokens(ask, BASE)
        for lead in LEADS:
            lead_ids = await _tokens(ask, lead)
            if await _continues(ask, base, lead, lead_ids):
                self._lead = lead
                self._lead_ids = lead_ids
                return
        raise UnusableTokenizer("the teacher's tokenizer cannot continue a text")

    async def encode(self, ask: AsksTokenizer, text: str) -> list[int]:
        """The ids of a text that comes after another text."""
        parts = await asyncio.gather(*(self._encode(ask, part) for part in self._specials.cut(text)))
        return [token_id for part in parts for token_id in part]

    async def _encode(self, ask: AsksTokenizer, text: str) -> list[int]:
        answer = await ask("/tokenize", _question(self._lead + text) | {"return_token_strs": True})
        ids = ids_of(answer)
        names = answer.get("token_strs") or ()
        names = [name for name in names if LIKELY_SPECIAL.fullmatch(name) and name in text]
        if names:
            self._specials.add(names)
            return await self.encode(ask, text)
        return ids[len(self._lead_ids) :]

    async def whole(self, ask: AsksTokenizer, ids: list[int]) -> list[int]:
        """The ids without an incomplete character at the end, which has at most three tokens."""
        for end in range(len(ids), max(0, len(ids) - 4), -1):
            tail = _text_of(await ask("/detokenize", {"tokens": ids[max(0, end - 8) : end]}))
            if not tail.endswith(UNFINISHED):
                return ids[:end]
        return ids  # the text itself has this character


UNFINISHED = "\ufffd"
"""Character at the end of a text whose last bytes are no complete character."""


def same_characters(left: str, right: str) -> bool:
    """Whether two texts differ at most in how their characters are composed."""
    return unicodedata.normalize("NFKC", left) == unicodedata.normalize("NFKC", right)


def _question(text: str) -> dict[str, Any]:
    return {"prompt": text, "add_special_tokens": False}


async def _tokens(ask: AsksTokenizer, text: str) -> list[int]:
    if not text:
        return []
    return ids_of(await ask("/tokenize", _question(text)))


def ids_of(answer: Mapping[str, Any]) -> list[int]:
    """The token ids in an answer of ``/tokenize``. Raises TeacherError if there are none."""
    ids = answer.get("tokens")
    if not isinstance(ids, list):
        raise TeacherError("nonsense", "the teacher's /tokenize answered without tokens")
    return ids


def _text_of(answer: Mapping[str, Any]) -> str:
    text = answer.get("prompt")
    if not isinstance(text, str):
        raise TeacherError("nonsense", "the teacher's /detokenize answered without a prompt")
    return text


async def _continues(ask: AsksTokenizer, base: list[int], lead: str, lead_ids: list[int]) -> bool:
    """Whether a text that is encoded after this lead fits after another text."""
    for start in STARTS:
        ids = await _tokens(ask, lead + start)
        if ids[: len(lead_ids)] != lead_ids:
            return False
        if _text_of(await ask("/detokenize", {"tokens": [*base, *ids[len(lead_ids) :]]})) != BASE + start:
            return False
    return True
