"""Parameters that do not work with two models, and token ids that are reserved."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from router.reserved import ReservedRows
from server.vllm_api import SamplingParams, VLLMValidationError


def unsupported(prompt: Any, params: SamplingParams) -> str | None:
    """Name of a parameter that cannot be used by two models, if the request has one."""
    if not isinstance(prompt, dict) or prompt.get("type") != "token":
        return "prompt"
    if params.repetition_penalty != 1.0:
        # The teacher gets these penalties as biases, which vLLM would scale by the repetition penalty.
        for penalty in ("frequency_penalty", "presence_penalty"):
            if getattr(params, penalty):
                return penalty
    return None


def check_reserved_rows(
    prompt: Any,
    params: SamplingParams,
    reserved: ReservedRows,
    names: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Refuse token ids of the router's rows; ``names``: see `server.http.names.names_as_sent`.

    Raises:
        VLLMValidationError: a parameter has the id of a reserved row.
    """
    named = {
        "prompt": prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None,
        "stop_token_ids": params.stop_token_ids,
        "allowed_token_ids": params.allowed_token_ids,
        "logit_bias": params.logit_bias,
        "logprob_token_ids": params.logprob_token_ids,
    }
    for parameter, ids in named.items():
        if not ids or max(ids) < reserved.start:
            continue
        # Ids beyond the vocabulary are left to vLLM, which refuses them.
        if (row := next((i for i in ids if reserved.start <= i < reserved.end), None)) is not None:
            message = f"token ids from {reserved.start} to {reserved.end - 1} are reserved"
            raise VLLMValidationError(message, parameter=names.get(parameter, parameter), value=row)
