"""Log-probabilities of the whole vocabulary, without the rows that are no tokens."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from server.vllm_api import Logprob, RequestOutput, SamplingParams

Entry = dict[int, Logprob] | None
"""Log-probabilities at one position, by token id; None for the first token of a prompt."""


def reports_all(params: SamplingParams) -> bool:
    """Whether a request wants the log-probabilities of the whole vocabulary."""
    return -1 in (params.logprobs, params.prompt_logprobs)


async def tokens_only(
    outputs: AsyncGenerator[RequestOutput, None], visible: int
) -> AsyncGenerator[RequestOutput, None]:
    """A request's outputs with log-probabilities of ids below ``visible`` only."""
    async with aclosing(outputs):
        async for output in outputs:
            output.prompt_logprobs = _visible(output.prompt_logprobs, visible)
            for new in output.outputs:
                new.logprobs = _visible(new.logprobs, visible)
            yield output


def _visible(entries: Sequence[Entry] | None, visible: int) -> Any:
    return entries and [_tokens(entry, visible) for entry in entries]


def _tokens(entry: Entry, visible: int) -> Entry:
    return entry and {token_id: logprob for token_id, logprob in entry.items() if token_id < visible}
