"""The HTTP request to a stock vLLM server for the rest of an ask."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from server.teacher.ask import Ask, AskProgress
from server.teacher.carried import MOST_BIASES, Screen, carried_biases

FORWARDED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "allowed_token_ids",
    "ignore_eos",
)
"""Sampling parameters that vLLM takes under the same name."""

COMPLETIONS = "/v1/completions"
"""Endpoint of every server. At every request, it turns the whole prompt into text and echoes it."""

GENERATE = "/inference/v1/generate"
"""Endpoint that takes and returns token ids alone; a server has it only with `--enable-scale-out`."""


class Post(NamedTuple):
    """A request to be made."""

    path: str
    body: dict[str, Any]
    tokens: int
    """Most tokens that the reply may hold."""


def post(
    progress: AskProgress,
    screen: Screen,
    model: str | None,
    allowed: Sequence[int] | None,
    *,
    generates: bool,
) -> Post:
    """The request for what is left of an ask.

    Args:
        progress: the ask, and its results so far.
        screen: rules that the server cannot apply by itself.
        model: the model's name at the server.
        allowed: the ids that the next token may have, if it is asked for alone; None for any.
        generates: whether the server has `GENERATE`.
    """
    ask = progress.ask
    tokens = 1 if progress.banned else progress.tokens_left  # a ban is for the next token only
    sampling = _sampling(progress, screen, tokens, allowed)
    ids = ask.spelled.spell(ask.prompt_ids, progress.written)
    fixed: dict[str, Any] = {"model": model, "stream": ask.streamed, "cache_salt": ask.cache_salt}
    if ask.streamed and ask.meter.prices is not None:
        fixed["stream_options"] = {"include_usage": True}
    if generates and ask.wants_ids_alone and not progress.grammar:
        sampling["detokenize"] = False
        return Post(GENERATE, _given(fixed | {"token_ids": ids, "sampling_params": sampling}), tokens)
    body = fixed | sampling | {"prompt": ids, "return_token_ids": True, "add_special_tokens": False}
    body["bad_words"] = ask.params.bad_words or None
    if ask.params.num_logprobs is not None:
        body |= {"logprobs": ask.params.num_logprobs, "return_tokens_as_token_ids": True}
        body["logprob_token_ids"] = ask.params.logprob_token_ids
    if allowed is None:
        body |= progress.grammar
    return Post(COMPLETIONS, _given(body), tokens)


def _sampling(
    progress: AskProgress, screen: Screen, tokens: int, allowed: Sequence[int] | None
) -> dict[str, Any]:
    """Sampling parameters that have the same names at both endpoints."""
    ask = progress.ask
    sampling: dict[str, Any] = {name: getattr(ask.params, name) for name in FORWARDED}
    min_tokens = max(0, min(ask.min_tokens - len(progress.written), tokens))
    if allowed is not None:
        sampling["allowed_token_ids"] = allowed
        min_tokens = 0  # an end may be all that the grammar leaves
    return _given(
        sampling
        | {
            "max_tokens": tokens,
            "min_tokens": min_tokens,
            "seed": _next_seed(ask.seed, progress),
            "stop_token_ids": _stops(ask, () if min_tokens else screen.charged) or None,
            "logit_bias": _biases(progress) or None,
        }
    )


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _stops(ask: Ask, charged: Collection[int]) -> list[int]:
    """Stop ids: those that end the completion, and ``charged`` ones, after which the screen would cut.

    With `min_tokens`, ``charged`` is empty, because vLLM would not write a stop token at all.
    """
    stops = list(ask.params.stop_token_ids or ())
    ends = () if ask.params.ignore_eos else ask.end_ids
    stops += [token_id for token_id in ends if token_id not in stops]
    return stops + sorted(set(charged).difference(stops))


def _next_seed(seed: int | None, progress: AskProgress) -> int | None:
    """Seed of the next request; with the same seed, it would draw the same id again."""
    if seed is None:
        return None
    refused = len(progress.padded) + len(progress.banned)
    return (seed + refused * 0x9E3779B1 + len(progress.written)) % 2**63


def _biases(progress: AskProgress) -> dict[int, float]:
    """Biases of the caller and of the written tokens, and -100 for ids that the teacher must not write."""
    biases = carried_biases(progress.ask.params, progress.completion)
    for token_id in sorted(progress.padded):
        if len(biases) < MOST_BIASES:
            biases[token_id] = -100.0
    return biases | dict.fromkeys(progress.banned, -100.0)
