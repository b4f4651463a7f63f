"""vLLM's outputs one token at a time, for the parsers of reasoning and of tool calls.

vLLM merges outputs that its reader has not taken yet, and speculative decoding brings several tokens at
once. Several of vLLM's parsers fail on a delta in which one part of an answer ends and the next begins.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace

from server.completion import new_detokenizer
from server.vllm_api import (
    CompletionOutput,
    IncrementalDetokenizer,
    RequestOutput,
    SamplingParams,
    TokenizerLike,
)


class SingleTokens:
    """Splits the deltas of one plain request; each token has the text that vLLM would give it alone."""

    def __init__(
        self, tokenizer: TokenizerLike | None, prompt_ids: list[int] | None, params: SamplingParams
    ) -> None:
        self._texts: list[IncrementalDetokenizer] = []
        for _ in range(params.n):
            self._texts.append(new_detokenizer(tokenizer, prompt_ids, params))

    def split(self, output: RequestOutput) -> Iterator[RequestOutput]:
        """Outputs of one token each, with the same tokens, log-probabilities and endings."""
        parts: list[CompletionOutput] = []
        for new in output.outputs:
            parts.extend(self._parts(new))
        for place, part in enumerate(parts, start=1):
            single = copy.copy(output)
            single.outputs = [part]
            single.finished = output.finished and place == len(parts)
            yield single

    def _parts(self, new: CompletionOutput) -> Iterator[CompletionOutput]:
        text = self._texts[new.index]
        last = max(0, len(new.token_ids) - 1)
        for place in range(last):
            if text.update([new.token_ids[place]], False) is not None:
                yield self._ending(new, text, place)  # tokens after a stop string stay with it
                return
            part = self._part(new, slice(place, place + 1))
            yield replace(
                part, text=text.get_next_output_text(False, True), finish_reason=None, stop_reason=None
            )
        by_token = new.finish_reason == "stop" and not isinstance(new.stop_reason, str)
        text.update(list(new.token_ids[last:]), by_token)
        yield self._ending(new, text, last)

    def _ending(self, new: CompletionOutput, text: IncrementalDetokenizer, start: int) -> CompletionOutput:
        part = self._part(new, slice(start, None))
        return replace(part, text=text.get_next_output_text(new.finish_reason is not None, True))

    @staticmethod
    def _part(new: CompletionOutput, part: slice) -> CompletionOutput:
        mask = new.sampling_mask
        return replace(
            new,
            token_ids=new.token_ids[part],
            logprobs=new.logprobs and new.logprobs[part],
            sampling_mask=mask and replace(mask, token_ids=mask.token_ids[part]),
        )
