"""Requests that would break vLLM's engine process are refused here, with a 400, at every budget.

vLLM's own checks let these through. Its V2 model runner (the one on GPUs) raises in the worker if there are
too many ids, which ends the engine and every request. A lone surrogate, half of a character, has no UTF-8.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from router.reserved import ReservedRows
from server.vllm_api import (
    MAX_NUM_ALLOWED_TOKEN_IDS,
    MAX_NUM_LOGIT_BIAS_TOKENS,
    MAX_NUM_STOP_TOKEN_IDS,
    SamplingParams,
    TokenizerLike,
    VLLMValidationError,
    max_bad_words_tokens,
)

END_TOKENS = 16
"""Room for stop ids of the gateway: the escalation token, and the end tokens of either model."""


def check_engine_limits(
    prompt: Any,
    params: SamplingParams,
    reserved: ReservedRows,
    tokenizer: TokenizerLike | None,
    names: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Refuse parameters that would break the engine; ``names``: see `server.http.names.names_as_sent`.

    Raises:
        VLLMValidationError: a parameter is too long or no text; the error names it.
    """
    texts = {
        "stop": params.stop,
        "bad_words": params.bad_words,
        "structured_outputs": params.structured_outputs,
        "vllm_xargs": params.extra_args,
        "cache_salt": prompt.get("cache_salt") if isinstance(prompt, dict) else None,
    }
    for parameter, value in texts.items():
        _check_text(names.get(parameter, parameter), value)
    # The gate needs its rows among the allowed ones.
    _check_count("allowed_token_ids", params.allowed_token_ids, MAX_NUM_ALLOWED_TOKEN_IDS - reserved.count)
    _check_count("logit_bias", params.logit_bias, MAX_NUM_LOGIT_BIAS_TOKENS - reserved.count)
    if params.min_tokens > 0:
        _check_count("stop_token_ids", params.stop_token_ids, MAX_NUM_STOP_TOKEN_IDS - END_TOKENS)
    if params.bad_words:
        _check_bad_words(params, tokenizer)


def _check_text(parameter: str, value: Any) -> None:
    if not value:
        return
    try:
        msgspec.msgpack.encode(value, enc_hook=repr)
    except UnicodeEncodeError as error:
        message = f"{parameter} holds half of a character (a lone surrogate), which is not text"
        raise VLLMValidationError(message, parameter=parameter) from error


def _check_count(parameter: str, ids: Any, most: int) -> None:
    if ids and len(ids) > most:
        message = f"{parameter} has {len(ids)} entries, and {most} is the most that the engine takes"
        raise VLLMValidationError(message, parameter=parameter, value=len(ids))


def _check_bad_words(params: SamplingParams, tokenizer: TokenizerLike | None) -> None:
    if tokenizer is None:
        return
    tokenized = params.clone()
    tokenized.update_from_tokenizer(tokenizer)
    tokens = sum(map(len, tokenized.bad_words_token_ids or ()))
    most = max_bad_words_tokens()
    if tokens > most:
        message = f"bad_words are {tokens} tokens, and {most} is the most that the engine takes"
        raise VLLMValidationError(message, parameter="bad_words", value=tokens)
