"""One completion written by two models: the merged tokens, their text, their log-probabilities."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from server.exchange import Report
from server.sources import STUDENT, Source
from server.vllm_api import (
    CompletionOutput,
    EngineCoreRequest,
    IncrementalDetokenizer,
    Logprob,
    LogprobsProcessor,
    RequestOutputKind,
    SamplingParams,
    TokenizerLike,
    convert_ids_list_to_tokens,
    repeats,
)


@dataclass
class Piece:
    """Some tokens that one model wrote in a row, and how it ended, if it did."""

    token_ids: Sequence[int]
    logprobs: Sequence[Any] | None = None
    """Log-probabilities of each token by token id, including the written one."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    asks: bool = False
    """Whether the student asks for the teacher after these tokens."""
    level: int = 0
    """Offset of the asking row from the escalation token; it tells which of several teachers is meant."""
    text: str = ""
    """Text in whole characters, if a teacher writes in tokens of its own."""

    def up_to(self, end: int) -> "Piece":
        """The first ``end`` tokens; without the ending if the last token is cut off."""
        if end >= len(self.token_ids):
            return self
        return Piece(self.token_ids[:end], self.logprobs and self.logprobs[:end])

    def singles(self) -> Iterator["Piece"]:
        """Pieces of one token each; the last one has the ending."""
        last = len(self.token_ids) - 1
        for place in range(last):
            part = slice(place, place + 1)
            yield Piece(self.token_ids[part], self.logprobs and self.logprobs[part])
        if last < 1:
            yield self
        else:
            yield replace(
                self, token_ids=self.token_ids[last:], logprobs=self.logprobs and self.logprobs[last:]
            )


def new_detokenizer(
    tokenizer: TokenizerLike | None, prompt_ids: list[int] | None, params: SamplingParams
) -> IncrementalDetokenizer:
    """A detokenizer of vLLM with its stop-string matcher, as vLLM's engine makes one for each request."""
    request = EngineCoreRequest(
        request_id="",
        prompt_token_ids=prompt_ids,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    return IncrementalDetokenizer.from_new_request(tokenizer if params.detokenize else None, request)


class Completion:
    """Accumulates pieces from both models and hands them out as vLLM's `CompletionOutput`.

    One incremental detokeniser and one stop-string matcher run over the merged ids, so a character
    or a stop string that crosses a span's border comes out as if one model had written it.
    """

    def __init__(
        self,
        tokenizer: TokenizerLike | None,
        prompt_ids: list[int],
        params: SamplingParams,
        index: int,
        report: Report,
    ) -> None:
        self.index = index
        self.params = params
        self.report = report
        if params.max_tokens is None:
            raise ValueError("a completion needs a length that ends it")
        self.max_tokens: int = params.max_tokens
        self._end_ids = frozenset([params.eos_token_id, *(params.stop_token_ids or ())]) - {None}
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._logprobs: list[dict[int, Logprob]] | None = None if params.num_logprobs is None else []
        self._cumulative_logprob = 0.0
        self._handed_out = 0
        tokenizer = tokenizer if params.detokenize else None
        self._detokenizer = new_detokenizer(tokenizer, prompt_ids, params)
        self._speller = LogprobsProcessor(tokenizer, self._logprobs, None, None, None, None)

    @property
    def token_ids(self) -> list[int]:
        """Ids of all tokens so far."""
        return self._detokenizer.output_token_ids

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def finished(self) -> bool:
        """Whether the completion has ended."""
        return self.finish_reason is not None

    @property
    def tokens_left(self) -> int:
        """Tokens that may still be written."""
        return self.max_tokens - len(self)

    def extend(self, piece: Piece, source: Source) -> int:
        """Append what ``source`` wrote.

        Ends the completion on the model's own stop, on a stop string, or at ``max_tokens``; tokens
        after a stop string are dropped.

        Returns:
            Number of tokens that were kept; only these count in budgets and reports.
        """
        piece = self._up_to_the_end(piece)
        start = len(self)
        stop_string = self._detokenizer.update(list(piece.token_ids), piece.finish_reason == "stop")
        kept = len(self) - start
        if self._logprobs is not None:
            for token_id, logprobs in zip(piece.token_ids[:kept], piece.logprobs or (), strict=False):
                self._spell(logprobs)
                self._logprobs.append(logprobs)
                self._cumulative_logprob += logprobs[token_id].logprob
        if stop_string is not None:
            self.finish_reason = "stop"
            self.stop_reason = stop_string
        elif piece.finish_reason not in (None, "length"):
            self.finish_reason = piece.finish_reason
            self.stop_reason = piece.stop_reason
        elif self.tokens_left <= 0:
            self.finish_reason = "length"
        self.report.completion_tokens = len(self)
        if source != STUDENT:
            self.report.taught(source, kept, len(self))
        return kept

    def _up_to_the_end(self, piece: Piece) -> Piece:
        """A piece up to the first token that ends the completion.

        A teacher with other end tokens may write more. A repetition across spans is noticed only here.
        """
        detects = self.params.repetition_detection is not None
        written = list(self.token_ids) if detects else []
        for place, token_id in enumerate(piece.token_ids):
            if token_id in self._end_ids:
                stop_reason = None if token_id == self.params.eos_token_id else token_id
                return Piece(piece.token_ids[: place + 1], piece.logprobs, "stop", stop_reason)
            if detects:
                written.append(token_id)
                long_enough = self.params.min_tokens <= len(written) < self.max_tokens
                if long_enough and repeats(written, self.params):
                    kept = piece.token_ids[: place + 1]
                    return Piece(kept, piece.logprobs, "repetition", "repetition_detected")
        return piece

    def _spell(self, logprobs: dict[int, Logprob]) -> None:
        """Add the texts of the next position's candidates, which neither model sends.

        As in vLLM, the token that ends a character has the text of the tokens before it too.
        """
        if self._speller.tokenizer is None:
            return
        ids = list(logprobs)
        texts = convert_ids_list_to_tokens(self._speller.tokenizer, ids)
        for logprob, text in zip(logprobs.values(), self._speller._verify_tokens(texts, ids), strict=True):
            logprob.decoded_token = text

    def output(self) -> CompletionOutput:
        """Output with the tokens that were not handed out yet (DELTA), or all (CUMULATIVE, FINAL_ONLY)."""
        delta = self.params.output_kind == RequestOutputKind.DELTA
        start = self._handed_out if delta else 0
        self._handed_out = len(self)
        return CompletionOutput(
            index=self.index,
            text=self._detokenizer.get_next_output_text(self.finished, delta),
            token_ids=self.token_ids[start:],
            cumulative_logprob=None if self._logprobs is None else self._cumulative_logprob,
            logprobs=None if self._logprobs is None else self._logprobs[start:],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
