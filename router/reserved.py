"""The reserved rows at the end of the student's vocabulary."""

from collections.abc import Iterable
from dataclasses import dataclass

RESERVED_ROWS = 32


def visible_rows(token_ids: Iterable[int]) -> int:
    """Number of rows up to the highest token id.

    Models pad their vocabulary: the rows after these are no tokens. Training leaves them out of every
    distribution, and serving masks them, so that neither student nor teacher writes one.
    """
    return max(token_ids, default=-1) + 1


@dataclass(frozen=True)
class ReservedRows:
    """Rows ``[start, start + count)`` of the output matrix, the last ones of the vocabulary.

    The first is the escalation token, the others are taps. They are rows of the model only: the
    tokenizer knows just the ids below ``start``, so no text can produce one, and the gate masks
    them all before sampling.
    """

    start: int
    count: int = RESERVED_ROWS

    def __post_init__(self) -> None:
        if self.start < 2 or self.count < 1:
            raise ValueError(f"reserved rows need start >= 2 and count >= 1, got {self}")

    @property
    def escalation(self) -> int:
        """Token id with which the student asks for the teacher."""
        return self.start

    @property
    def end(self) -> int:
        """One past the last row: the model's vocabulary size."""
        return self.start + self.count

    @property
    def taps(self) -> slice:
        """Columns of the logits that hold the taps."""
        return slice(self.start + 1, self.end)

    @classmethod
    def at_end(cls, vocab_size: int, tokenizer_size: int, count: int = RESERVED_ROWS) -> "ReservedRows":
        """The last ``count`` rows that the tokenizer leaves free (fewer if fewer are free).

        Raises:
            ValueError: the vocabulary has no row to spare.
        """
        spare = vocab_size - tokenizer_size
        if spare < 1:
            raise ValueError(
                f"the vocabulary has no spare row for the escalation token: {vocab_size} rows in the "
                f"model, {tokenizer_size} in the tokenizer"
            )
        count = min(count, spare)
        return cls(start=vocab_size - count, count=count)

    @classmethod
    def for_model(cls, vocab_size: int, tokenizer_size: int) -> "ReservedRows":
        """The last rows that the tokenizer leaves free; if there are none, rows after all others.

        Rows after all others end after ``vocab_size``: the model has to get them (see `router.rows`).
        """
        if vocab_size > tokenizer_size:
            return cls.at_end(vocab_size, tokenizer_size)
        return cls(start=tokenizer_size)
