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
"""Up to this many tokens a span comes as one JSON body: cheaper on both sides than a stream."""


class SpelledIds:
    """Token ids as JSON, of a list that only grows: every id is spelled once, not at every call."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._count = 0

    def spell(self, ids: Sequence[int], more: Sequence[int] = ()) -> msgspec.Raw:
        """The list ``ids``, which begins with all earlier ones, and after it ``more`` of this call alone."""
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
    """What one call asks the teacher for."""

    prompt_ids: Sequence[int]
    """Prompt and completion so far."""
    tokens: int
    """The most that it may write."""
    params: SamplingParams
    """The caller's."""
    written: int = 0
    """Tokens at the end of ``prompt_ids`` that are the completion's."""
    min_tokens: int = 0
    seed: int | None = None
    end_ids: Sequence[int] = ()
    """Ids that end a completion of the student, its own end token first; the teacher may have others."""
    cache_salt: str | None = None
    meter: Meter = field(default_factory=Meter)
    """Counts what the span costs, and may bound it."""
    as_text: bool = False
    """The ids are the teacher's own; its text is what is wanted, and the call is closed when it is enough."""
    constraint: Constraint | None = None
    """Of structured output. It has to be at the end of the prompt, and advances with what is written."""
    grammar: Mapping[str, Any] = field(default_factory=dict)
    """Of structured output that is checked elsewhere: fields of the request, for the teacher to keep to."""
    adapter: str | None = None
    """The student's LoRA adapter: the teacher uses its own of that name, if it has one."""
    spelled: SpelledIds = field(default_factory=SpelledIds)
    """Spells the prompt; one that spelled an earlier prompt of the same choice has most of it already."""

    @property
    def wants_ids_alone(self) -> bool:
        """Whether ids and an ending are all that the reply has to tell, and no rule needs text."""
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
    """Whether the teacher has not refused the grammar itself."""
    ended: bool = False
    """Whether the last piece had an ending."""

    @property
    def completion(self) -> list[int]:
        """All that is written."""
        start = len(self.ask.prompt_ids) - self.ask.written
        return [*self.ask.prompt_ids[start:], *self.written]

    def tail(self, tokens: int) -> list[int]:
        """The last ``tokens`` of what is written, or all."""
        here = self.written[max(0, len(self.written) - tokens) :]
        before = min(tokens - len(here), self.ask.written)
        return [*self.ask.prompt_ids[len(self.ask.prompt_ids) - before :], *here]

    @property
    def tokens_left(self) -> int:
        """Tokens of the ask that are still to come."""
        return self.ask.tokens - len(self.written)

    def allowed(self) -> list[int] | None:
        """What the grammar leaves for the next token, if that one is asked for alone, and they are few."""
        if self.ask.constraint is None or not (self.banned or self.tokens_left == 1):
            return None
        return next_ids(self.ask.constraint, self.ask.params)

    @property
    def grammar(self) -> dict[str, Any]:
        """The grammar for a teacher that is asked from its beginning on."""
        if self.banned or not self.takes_grammar:
            return {}
        if self.ask.constraint is None:
            return {} if self.written else dict(self.ask.grammar)
        return self.ask.constraint.fields

    def take(self, reply: Reply) -> None:
        """Count what came."""
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
