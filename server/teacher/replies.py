"""Strict parsing of a stock vLLM server's replies on /v1/completions."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from server.completion import Piece
from server.teacher.errors import TeacherError
from server.vllm_api import Logprob, SamplingParams

REFUSALS = (400, 413, 422)
"""Statuses that report a wrong request, not a fault of the server."""

QUOTED = 200
"""Characters of a reply that the log quotes."""


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(msgspec.Struct):
    text: str = ""
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Error(msgspec.Struct):
    code: Any = None
    message: str = ""


class _Completion(msgspec.Struct):
    choices: list[_Choice] = []
    error: _Error | None = None
    """What a stream holds where a plain reply would have another status."""
    usage: _Usage | None = None


class Counted(NamedTuple):
    """What a server counted of one request."""

    written: int
    cached: int | None
    """Tokens of the prompt that were in its prefix cache; None if it does not report them."""


class Reply(NamedTuple):
    """A piece of the teacher's, cut before the first id that cannot stay."""

    piece: Piece
    again: bool = False
    """The teacher is to be asked again from here: the piece has no ending, and what came after it is lost."""
    padded: int | None = None
    """The next id, if the student does not have it."""
    banned: int | None = None
    """The next id, if it ends a bad word, or a grammar refuses it."""
    received: int = 0
    """Tokens that arrived, those that are cut off among them."""


def quoted(text: str) -> str:
    """The beginning of a reply on one line, for the log."""
    return " ".join(text[: 2 * QUOTED].split())[:QUOTED]


def read_reply(payload: bytes, *, room: int, params: SamplingParams, vocabulary: int) -> Reply:
    """Read one body, or one event of a stream.

    Args:
        payload: JSON of vLLM's completion or of one of its chunks.
        room: the most tokens that it may hold.
        params: say which log-probabilities were asked for.
        vocabulary: the student has the ids below this.

    Raises:
        TeacherError: the payload is an error, or nothing that was asked for.
    """
    choice = _choice(payload)
    ids = choice.token_ids or []
    if len(ids) > room or any(token_id < 0 for token_id in ids):
        raise TeacherError(
            "nonsense", f"the teacher wrote token ids {ids[:20]}, but at most {room} were asked for"
        )
    if not ids and choice.finish_reason == "length":
        raise TeacherError("nonsense", "the teacher wrote nothing and did not end the completion")
    if choice.finish_reason not in (None, "stop", "length"):
        raise TeacherError("nonsense", f"the teacher finished with {choice.finish_reason!r}")
    kept = _visible(ids, vocabulary)
    entries = None
    if params.num_logprobs is not None and ids:
        wanted = params.logprob_token_ids
        entries = _entries(ids, choice.logprobs, wanted, vocabulary)[: len(kept)]
    if len(kept) < len(ids):
        return Reply(Piece(kept, entries), again=True, padded=ids[len(kept)], received=len(ids))
    piece = Piece(ids, entries, choice.finish_reason, choice.stop_reason, text=choice.text)
    return Reply(piece, received=len(ids))


def read_usage(payload: bytes) -> Counted | None:
    """What a body, or the last event of a stream, reports of its request; None if it reports nothing."""
    try:
        usage = msgspec.json.decode(payload, type=_Completion).usage
    except (msgspec.MsgspecError, ValueError):
        return None  # it is nothing that the completion needs
    if usage is None:
        return None
    details = usage.prompt_tokens_details
    return Counted(usage.completion_tokens, None if details is None else details.cached_tokens)


def _choice(payload: bytes) -> _Choice:
    try:
        completion = msgspec.json.decode(payload, type=_Completion)
    except (msgspec.MsgspecError, ValueError) as error:
        raise TeacherError("nonsense", f"the teacher's reply is not a completion: {error}") from error
    problem = completion.error
    if problem is not None:
        message = f"the teacher reports {problem.code}: {quoted(problem.message)}"
        refused = problem.code in REFUSALS
        raise TeacherError("status" if refused else "nonsense", message, refused=refused)
    if len(completion.choices) != 1:
        raise TeacherError("nonsense", f"the teacher's reply has {len(completion.choices)} choices")
    return completion.choices[0]


def _visible(ids: Sequence[int], vocabulary: int) -> Sequence[int]:
    """The ids before the first one that the student does not have."""
    for position, token_id in enumerate(ids):
        if token_id >= vocabulary:
            return ids[:position]
    return ids


def _entries(
    ids: Sequence[int], reply: _Logprobs | None, wanted: Sequence[int] | None, vocabulary: int
) -> list[dict[int, Logprob]]:
    """The dictionary that vLLM has for each token: of the ``wanted`` ids, or of the best."""
    if reply is None:
        raise TeacherError("nonsense", "the teacher's reply has no log-probabilities")
    tops = reply.top_logprobs or [None] * len(ids)
    if not len(reply.token_logprobs) == len(tops) == len(ids):
        raise TeacherError("nonsense", "the teacher's log-probabilities do not match its tokens")
    entries = []
    for token_id, chosen, top in zip(ids, reply.token_logprobs, tops, strict=True):
        if chosen is None:
            raise TeacherError("nonsense", "the teacher's log-probabilities lack a written token")
        by_id = _by_id(top or {})
        logprobs = _best(by_id, vocabulary) if wanted is None else _of(wanted, by_id, vocabulary)
        # As vLLM does: the written token first.
        entries.append({token_id: logprobs.pop(token_id, Logprob(chosen))} | logprobs)
    return entries


def _by_id(top: dict[str, float]) -> dict[int, float]:
    """Keys of ``top`` are ``token_id:17``."""
    try:
        return {int(token.removeprefix("token_id:")): value for token, value in top.items()}
    except ValueError as error:
        raise TeacherError("nonsense", f"the teacher's log-probabilities have no ids: {error}") from error


def _best(by_id: dict[int, float], vocabulary: int) -> dict[int, Logprob]:
    """The best ones in order.

    A teacher may have rows beyond the common ``vocabulary``: they are left out, as the student's are.
    """
    visible = (item for item in by_id.items() if item[0] < vocabulary)
    ranked = sorted(visible, key=lambda item: -item[1])
    return {i: Logprob(value, rank=rank) for rank, (i, value) in enumerate(ranked, start=1)}


def _of(wanted: Sequence[int], by_id: dict[int, float], vocabulary: int) -> dict[int, Logprob]:
    """Those of `logprob_token_ids`, in their order; a row beyond the ``vocabulary`` is no token."""
    logprobs = {}
    for rank, token_id in enumerate(wanted, start=1):
        value = by_id.get(token_id) if token_id < vocabulary else -math.inf
        if value is None:
            raise TeacherError("nonsense", f"the teacher's log-probabilities lack the token {token_id}")
        logprobs[token_id] = Logprob(value, rank=rank)
    return logprobs
