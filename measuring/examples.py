"""Examples with all their right answers, and the similarity of a text to the nearest one.

`References` is a small grammar rather than a list. Free variation multiplies: three synonyms here, two word
orders there, and a sentence easily has thousands of right answers.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein

from measuring.chats import Source, source_of
from measuring.json_lines import is_text, read_json_lines, read_some_json_lines

Slot = tuple[str, ...]
"""The alternatives for one part of an answer."""
Form = tuple[Slot, ...]
"""The slots of an answer, in order."""
Forms = list[list[list[str]]]
"""Forms as JSON holds them: `[form][slot][alternative]`."""

LISTED = 500
"""A form with at most this many answers is compared answer by answer, which is then faster."""
_EDIT = 1 << 14  # weight of one edit in `_least`; larger than any answer is long


@dataclass(frozen=True)
class Nearest:
    """How far a text is from the nearest right answer. Of equally near answers the longest counts."""

    edits: int
    """Levenshtein distance to that answer."""
    length: int
    """Length of that answer, in characters."""


def _rank(nearest: Nearest) -> tuple[int, int]:
    """Sort key: the nearest answer has the smallest."""
    return (nearest.edits, -nearest.length)


@dataclass(frozen=True)
class References:
    """All right answers to one source.

    An answer is one form, and in it one alternative per slot, joined without separators.
    """

    forms: tuple[Form, ...]

    @classmethod
    def one(cls, text: str) -> "References":
        """References with this text as the only right answer."""
        return cls((((text,),),))

    @classmethod
    def from_json(cls, forms: Forms) -> "References":
        """References from the forms that `to_json` returned."""
        read: list[Form] = []
        for form in forms:
            read.append(tuple(map(tuple, form)))
        return cls(tuple(read))

    def to_json(self) -> Forms:
        """The forms as `[form][slot][alternative]`, the format of `examples.jsonl`."""
        written: Forms = []
        for form in self.forms:
            written.append(list(map(list, form)))
        return written

    def __len__(self) -> int:
        return sum(map(_count, self.forms))

    def __bool__(self) -> bool:
        return bool(self.forms)

    def first(self) -> str:
        """The answer of the first form and each slot's first alternative."""
        return "".join(slot[0] for slot in self.forms[0])

    def sample(self, rng: random.Random) -> str:
        """One right answer; its form and alternatives are drawn uniformly."""
        form = rng.choice(self.forms)
        return "".join(map(rng.choice, form))

    def accepts(self, text: str) -> bool:
        """Whether the text is one of the right answers."""
        return any(_accepts(form, text) for form in self.forms)

    def similarity(self, text: str) -> float:
        """How near the text is to the nearest right answer, in [0, 1]; 0 if none is known.

        It is 1 - d / max(len(text), len(nearest)), with d the Levenshtein distance.
        """
        if self.accepts(text):
            return 1.0
        if not self.forms:
            return 0.0
        nearest = min([_nearest(form, text) for form in self.forms], key=_rank)
        longest = max(len(text), nearest.length)
        return 1.0 - nearest.edits / longest if longest else 1.0


NO_REFERENCES = References(())


@dataclass(frozen=True)
class Example:
    """A prompt for a pair, and all right answers to it."""

    source: Source
    references: References = NO_REFERENCES


def sources_of(examples: Iterable[Example]) -> list[Source]:
    """The source of each example, in order."""
    return [example.source for example in examples]


def load_examples(file: Path) -> list[Example]:
    """The examples of a file. Each line has the fields of `source_of`, and `references` (see `to_json`).

    Raises:
        DataError: the file or a line of it cannot be used.
    """
    examples = []
    for row in read_some_json_lines(file):
        forms = row.fields.get("references")
        if forms is None or not _is_grammar(forms):
            raise row.error(
                "'references' must be a list of forms, each a list of slots, each a list of alternatives"
            )
        examples.append(Example(source_of(row), References.from_json(forms)))
    return examples


def load_sources(file: Path) -> list[str]:
    """The `source` of every line of a file.

    Raises:
        DataError: the file or a line of it cannot be used.
    """
    return [row.text("source") for row in read_json_lines(file)]


def _is_grammar(forms: Any) -> bool:
    """Whether the value is `[form][slot][alternative]` with at least one answer."""
    return isinstance(forms, list) and bool(forms) and all(map(_is_form, forms))


def _is_form(form: Any) -> bool:
    return isinstance(form, list) and all(map(_is_slot, form))


def _is_slot(slot: Any) -> bool:
    return isinstance(slot, list) and bool(slot) and all(map(_is_alternative, slot))


def _is_alternative(value: Any) -> bool:
    return isinstance(value, str) and is_text(value)


def _count(form: Form) -> int:
    return prod(map(len, form))


def _answers(form: Form) -> Iterator[str]:
    return map("".join, product(*form))


def _accepts(form: Form, text: str) -> bool:
    ends = {0}
    for slot in form:
        reached = set()
        for end, choice in product(ends, slot):
            if text.startswith(choice, end):
                reached.add(end + len(choice))
        ends = reached
    return len(text) in ends


def _nearest(form: Form, text: str) -> Nearest:
    if _count(form) > LISTED:
        return _least(form, text)
    found = []
    for answer in _answers(form):
        found.append(Nearest(Levenshtein.distance(text, answer), len(answer)))
    return min(found, key=_rank)


def _least(form: Form, text: str) -> Nearest:
    """The nearest answer of a form, by dynamic programming over its slots.

    The row after a slot is the minimum of the rows of its alternatives. Cells hold `_EDIT` x edits -
    characters of the answer, so the result also holds the nearest answer's length.
    """
    characters = np.array(list(map(ord, text)), dtype=np.int64)
    insertions = np.arange(len(text) + 1, dtype=np.int64) * _EDIT
    row = insertions.copy()
    for slot in form:
        ends = []
        for choice in slot:
            cells = row
            for character in choice:
                new = cells + (_EDIT - 1)
                np.minimum(new[1:], cells[:-1] + (characters != ord(character)) * _EDIT - 1, out=new[1:])
                cells = np.minimum.accumulate(new - insertions) + insertions
            ends.append(cells)
        row = np.minimum.reduce(ends)
    least = int(row[-1])
    edits = -(-least // _EDIT)
    return Nearest(edits, edits * _EDIT - least)
