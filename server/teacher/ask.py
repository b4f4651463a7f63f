"""A request to a teacher, and its progress."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from server.grammar.constraint import Constraint
from server.teacher.constrained import next_ids
from server.teacher.meter import Meter
from server.teacher.replies import Reply
from server.vllm_api import SamplingParams

STREAM_ABOVE = 8
"""Most tokens of a span that comes as one JSON body, which is cheaper on both sides than a stream."""


class SpelledIds:
    """A growing list of token ids as JSON: every id is spelled once, not at every call."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._count = 0

    def spell(self, ids: Sequence[int], more: Sequence[int] = ()) -> msgspec.Raw:
        """JSON of ``ids``, which begin with all earlier ones, followed by ``more`` for this call alone."""
        self._append(self._text, ids[self._count :])
        self._count = len(ids)
        text = bytearray(self._text)
        self._append(text, more)
        return msgspec.Raw(b"[" + bytes(text) + b"]")

    @staticmethod
    def _append(text: bytearray, ids: Sequence[int]) -> None:
        if ids:
            text += (b"," if text else b"") + msgspec.json.encode(ids)[1:-1]


@dataclass(frozen=True)
class Ask:
    """The request of one call to the teacher."""

    prompt_ids: Sequence[int]
    """Token ids of prompt and completion so far."""
    tokens: int
    """Most tokens that the teacher may write."""
    params: SamplingParams
    """The caller's sampling parameters."""
    written: int = 0
    """Number of tokens at the end of ``prompt_ids`` that are the completion's."""
    min_tokens: int = 0
    seed: int | None = None
    end_ids: Sequence[int] = ()
    """Ids that end a completion of the student, its own end token first; the teacher may have others."""
    cache_salt: str | None = None
    meter: Meter = field(default_factory=Meter)
    """Counts what the span costs, and may bound it."""
    as_text: bool = False
    """Whether the teacher's text is used, not its ids. The call is closed when the text is enough."""
    constraint: Constraint | None = None
    """Constraint of structured output, at the end of the prompt. It advances with the written tokens."""
    grammar: Mapping[str, Any] = field(default_factory=dict)
    """Request fields of structured output for the teacher to follow, if it is checked elsewhere."""
    adapter: str | None = None
    """Name of the student's LoRA adapter: the teacher uses its own of that name, if it has one."""
    spelled: SpelledIds = field(default_factory=SpelledIds)
    """Spells the prompt; one that spelled an earlier prompt of the same choice has most of it already."""

    @property
    def wants_ids_alone(self) -> bool:
        """Whether the reply needs nothing but ids and an ending, and no rule needs text."""
        told = self.as_text or self.params.num_logprobs is not None
        return not told and self.constraint is None and not self.params.bad_words

    @property
    def streamed(self) -> bool:
        """Whether the span is long enough to be streamed, or may end earlier than the teacher knows."""
        return self.as_text or self.tokens > STREAM_ABOVE or self.reports_all

    @property
    def reports_all(self) -> bool:
        """Whether all of a token's log-probabilities are wanted: megabytes for each."""
        return self.params.logprobs == -1


@dataclass
class AskProgress:
    """The results of an ask so far."""

    ask: Ask
    written: list[int] = field(default_factory=list)
    padded: set[int] = field(default_factory=set)
    """Ids that the teacher drew and the student does not have."""
    banned: set[int] = field(default_factory=set)
    """Ids that the teacher drew for the next token: they end a bad word there, or a grammar refuses them."""
    refused_in_a_row: int = 0
    takes_grammar: bool = True
    """False after the teacher has refused the grammar itself."""
    ended: bool = False
    """Whether the last piece had an ending."""

    @property
    def completion(self) -> list[int]:
        """Token ids of the completion so far."""
        start = len(self.ask.prompt_ids) - self.ask.written
        return [*self.ask.prompt_ids[start:], *self.written]

    def tail(self, tokens: int) -> list[int]:
        """The last ``tokens`` ids of the completion, or all."""
        here = self.written[max(0, len(self.written) - tokens) :]
        before = min(tokens - len(here), self.ask.written)
        return [*self.ask.prompt_ids[len(self.ask.prompt_ids) - before :], *here]

    @property
    def tokens_left(self) -> int:
        """Number of the ask's tokens that are still to come."""
        return self.ask.tokens - len(self.written)

    def allowed(self) -> list[int] | None:
        """The ids that the grammar allows next, if one token is asked for and they are few; else None."""
        if self.ask.constraint is None or not (self.banned or self.tokens_left == 1):
            return None
        return next_ids(self.ask.constraint, self.ask.params)

    @property
    def grammar(self) -> dict[str, Any]:
        """Request fields of the grammar, if the teacher can begin with it; else empty."""
        if self.banned or not self.takes_grammar:
            return {}
        if self.ask.constraint is None:
            return {} if self.written else dict(self.ask.grammar)
        return self.ask.constraint.fields

    def take(self, reply: Reply) -> None:
        """Note a reply of the teacher."""
        self.ended = reply.piece.finish_reason is not None
        if reply.piece.token_ids:
            self.written += reply.piece.token_ids
            self.banned.clear()
            self.refused_in_a_row = 0
        if reply.padded is not None:
            self.padded.add(reply.padded)
        if reply.banned is not None:
            self.banned.add(reply.banned)
        self.refused_in_a_row += reply.padded is not None or reply.banned is not None
