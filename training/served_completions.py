"""Completions of prompts in token ids, written by a stock vLLM server."""

from collections.abc import Sequence

import msgspec

from training.sampling import until_end
from training.served import VLLMServer

PATH = "/v1/completions"
BANNED = -100.0
"""The strongest negative bias of OpenAI's protocol."""


class _Completion(msgspec.Struct):
    index: int
    token_ids: list[int]


def completed(
    server: VLLMServer,
    prompts: Sequence[list[int]],
    *,
    visible: int,
    end: int,
    longest: int,
    temperature: float,
    banned: range = range(0),
) -> list[list[int]]:
    """A completion of each prompt, as token ids that include the end token.

    Args:
        server: the server that writes the completions.
        prompts: the token ids of each prompt.
        visible: all ids of a completion must be below this.
        end: id of the end-of-sequence token.
        longest: most tokens in a completion, including the end token.
        temperature: temperature of sampling; 0 is greedy.
        banned: ids that the server must not write.

    Raises:
        ServerError: the server cannot be used, or its reply is not valid.
    """
    body: dict[str, object] = {
        "model": server.model,
        "prompt": prompts,
        "max_tokens": longest,
        "temperature": temperature,
        "top_p": 1,
        "top_k": 0,
        "return_token_ids": True,
    }
    if banned:
        body["logit_bias"] = dict.fromkeys(map(str, banned), BANNED)
    choices = server.post(PATH, body).get("choices")
    if not isinstance(choices, list) or len(choices) != len(prompts):
        raise server.error(PATH, f"did not reply with {len(prompts)} completions")
    answers: dict[int, list[int]] = {}
    for choice in choices:
        try:
            index, ids = msgspec.structs.astuple(msgspec.convert(choice, _Completion))
        except msgspec.ValidationError as error:
            raise server.error(PATH, f"gave a completion without an index and token_ids: {error}") from error
        if not 0 < len(ids) <= longest:
            raise server.error(PATH, f"gave a completion of {len(ids)} tokens, not of 1 to {longest}")
        if not all(0 <= token < visible for token in ids):
            raise server.error(PATH, f"gave a completion with ids outside 0 to {visible - 1}")
        answers[index] = until_end(ids, end)
    if answers.keys() != set(range(len(prompts))):
        raise server.error(PATH, f"gave completions that are not numbered 0 to {len(prompts) - 1}")
    return [answers[number] for number in range(len(prompts))]
