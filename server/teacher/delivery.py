"""Converts the teacher's text to the student's ids, up to the size of a grant."""

from server.teacher.words import UNFINISHED, StudentWords, same_characters

LONGEST_WORD = 64
"""Most characters that are held back until the rest of a word comes."""


class Delivery:
    """One span's text, delivered word by word, as the student would split it.

    It is full when the next character does not fit into the grant. `rest` is the text that did not fit.
    """

    def __init__(self, words: StudentWords, tokens: int, *, to_the_end: bool) -> None:
        """Begin a span.

        Args:
            words: the student's words.
            tokens: the most ids that may be delivered.
            to_the_end: whether the completion ends after them; then, as with one model, perhaps within a
                character.
        """
        self._words = words
        self._to_the_end = to_the_end
        self.left = tokens
        """Ids that may still be delivered."""
        self.rest = ""
        """Text that is not delivered."""
        self.full = tokens < 1
        self.stuck = False
        """Whether the rest begins with a character that the student has no tokens for."""

    @property
    def done(self) -> bool:
        """Whether nothing more can be delivered."""
        return self.full or self.stuck

    def add(self, text: str) -> list[int]:
        """The ids of the words that are complete with this text."""
        self.rest += text
        return self._deliver(last_border(self.rest))

    def flush(self) -> list[int]:
        """The ids of the text that is held back, at the end of the span."""
        return self._deliver(len(self.rest))

    def _deliver(self, characters: int) -> list[int]:
        if self.done or not self.rest:
            return []
        whole = self._words.encode(self.rest).ids
        if len(whole) > self.left or (self._to_the_end and len(whole) == self.left):
            return self._cut(whole)
        word = self.rest[:characters]
        encoded = self._words.encode(word)
        if len(encoded.ids) > self.left:  # alone it may be more tokens than with what follows
            return self._cut(encoded.ids)
        self.stuck = encoded.text != word
        self.rest = self.rest[len(encoded.text) :]
        return self._counted(encoded.ids)

    def _cut(self, ids: list[int]) -> list[int]:
        """The first ids, as many as there is room for, up to the end of a character."""
        self.full = True
        if self._to_the_end:
            self.rest = ""
            return self._counted(ids[: self.left])
        for end in range(self.left, 0, -1):
            text = self._words.decode(ids[:end])
            if self.rest.startswith(text) or not text.endswith(UNFINISHED):
                self.rest = after(self.rest, text)
                return self._counted(ids[:end])
        return []

    def _counted(self, ids: list[int]) -> list[int]:
        self.left -= len(ids)
        self.full |= self.left < 1
        return ids


def last_border(text: str) -> int:
    """Index of a text's last word, with the space before it; later text may still belong to this word."""
    for place in range(len(text) - 1, 0, -1):
        if text[place].isspace() and not text[place - 1].isspace():
            return place
    return max(0, len(text) - LONGEST_WORD)


def after(text: str, beginning: str) -> str:
    """The text after its beginning, whose characters may be composed in another way."""
    if text.startswith(beginning):
        return text[len(beginning) :]
    for end in range(1, len(text) + 1):
        if same_characters(text[:end], beginning):
            return text[end:]
    return ""
