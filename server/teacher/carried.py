"""Applies rules of the whole completion to a teacher's server, which sees only a span.

To a stock server, the completion so far is part of the prompt. So it gets the penalties for these tokens as
biases, and its tokens are screened: after some of them, the rules need another request.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from server.completion import Piece
from server.vllm_api import SamplingParams

MOST_BIASES = 1000
"""Most biases for written tokens. vLLM takes 1,024 in a request: some are left for ids that a teacher must
not write.
"""


def penalises(params: SamplingParams) -> bool:
    """Whether every written token becomes a bias."""
    return bool(params.frequency_penalty or params.presence_penalty)


def carried_biases(params: SamplingParams, written: Iterable[int]) -> dict[int, float]:
    """The caller's biases, minus the penalties for the written tokens.

    vLLM adds biases and subtracts penalties one after the other, so both together have the same effect as
    penalties in one model.
    """
    biases = dict(params.logit_bias or {})
    if penalises(params):
        for token_id, times in Counter(written).items():
            penalty = params.frequency_penalty * times + params.presence_penalty
            biases[token_id] = biases.get(token_id, 0.0) - penalty
    return biases


class Screened(NamedTuple):
    """The part of a teacher's piece that can stay."""

    piece: Piece
    """The part that stays; without an ending if the teacher is asked again."""
    again: bool = False
    """Whether the teacher is to be asked again from here."""
    banned: int | None = None
    """The next id, if it was cut off because it ends a bad word, or because a grammar refuses it."""


class Screen(NamedTuple):
    """Rules that a teacher's server cannot apply by itself in one request."""

    charged: Collection[int] = ()
    """Ids with a `presence_penalty` in their bias: once one comes again, vLLM would subtract it twice."""
    bad_words: Sequence[Sequence[int]] = ()
    """Bad words as token ids; vLLM itself sees only those that begin in the span."""

    @classmethod
    def of(cls, params: SamplingParams, written: Iterable[int]) -> "Screen":
        """The screen of a request after these tokens of the completion."""
        charged = frozenset(written) if params.presence_penalty else frozenset()
        return cls(charged, params.bad_words_token_ids or ())

    @property
    def reach(self) -> int:
        """Number of tokens before a piece that matter for it."""
        return max(map(len, self.bad_words), default=1) - 1

    def apply(self, piece: Piece, before: Sequence[int]) -> Screened:
        """Cut a piece that comes after these tokens, of which the last ``reach`` matter."""
        if not self.charged and not self.bad_words:
            return Screened(piece)
        past = list(before)
        for place, token_id in enumerate(piece.token_ids):
            if self._ends_a_bad_word(past, token_id):
                return Screened(piece.up_to(place), again=True, banned=token_id)
            past.append(token_id)
            if token_id in self.charged and not _ends_at(piece, place):
                return Screened(_without_ending(piece, place + 1), again=True)
        return Screened(piece)

    def _ends_a_bad_word(self, past: Sequence[int], token_id: int) -> bool:
        for word in self.bad_words:
            start = len(past) - len(word) + 1
            if word[-1] == token_id and start >= 0 and list(word[:-1]) == list(past[start:]):
                return True
        return False


def _without_ending(piece: Piece, end: int) -> Piece:
    """The first ``end`` tokens of a piece, without its ending."""
    return Piece(piece.token_ids[:end], piece.logprobs and piece.logprobs[:end])


def _ends_at(piece: Piece, place: int) -> bool:
    """Whether a piece ends with this token for another reason than being a stop token of the screen."""
    if place + 1 < len(piece.token_ids) or piece.finish_reason is None:
        return False
    return piece.finish_reason != "stop" or piece.stop_reason != piece.token_ids[place]
