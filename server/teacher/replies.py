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
    """Error in a stream, in place of the status of a plain reply."""
    usage: _Usage | None = None


class Counted(NamedTuple):
    """Tokens of one request, as its server counted them."""

    written: int
    cached: int | None
    """Tokens of the prompt that were in its prefix cache; None if it does not report them."""


class Reply(NamedTuple):
    """A piece from the teacher, cut before the first id that cannot stay."""

    piece: Piece
    again: bool = False
    """Whether the teacher is to be asked again from here; the piece then has no ending."""
    padded: int | None = None
    """The next id, if the student does not have it."""
    banned: int | None = None
    """The next id, if it ends a bad word, or a grammar refuses it."""
    received: int = 0
    """Number of tokens that arrived, including those that were cut off."""


def quoted(text: str) -> str:
    """The beginning of a reply on one line, for the log."""
    return " ".join(text[: 2 * QUOTED].split())[:QUOTED]


def read_reply(payload: bytes, *, room: int, params: SamplingParams, vocabulary: int) -> Reply:
    """Read one body, or one event of a stream.

    Args:
        payload: JSON of vLLM's completion or of one of its chunks.
        room: the most tokens that it may hold.
        params: the caller's parameters, with the log-probabilities that were asked for.
        vocabulary: the student's token ids are below this.

    Raises:
        TeacherError: the payload is an error, or not what was asked for.
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
    """The token counts in a body, or in the last event of a stream; None if it has none."""
    try:
        usage = msgspec.json.decode(payload, type=_Completion).usage
    except (msgspec.MsgspecError, ValueError):
        return None  # the completion does not need it
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
    """Log-probabilities by id for each token, as vLLM has them: of the ``wanted`` ids, or of the best."""
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
    """Log-probabilities by token id, from ``top`` with keys such as ``token_id:17``."""
    try:
        return {int(token.removeprefix("token_id:")): value for token, value in top.items()}
    except ValueError as error:
        raise TeacherError("nonsense", f"the teacher's log-probabilities have no ids: {error}") from error


def _best(by_id: dict[int, float], vocabulary: int) -> dict[int, Logprob]:
    """The best log-probabilities in order, with their ranks.

    A teacher may have rows beyond the common ``vocabulary``: they are left out, as the student's are.
    """
    visible = (item for item in by_id.items() if item[0] < vocabulary)
    ranked = sorted(visible, key=lambda item: -item[1])
    return {i: Logprob(value, rank=rank) for rank, (i, value) in enumerate(ranked, start=1)}


def _of(wanted: Sequence[int], by_id: dict[int, float], vocabulary: int) -> dict[int, Logprob]:
    """Log-probabilities of the ``wanted`` ids, in their order; -inf for an id beyond the ``vocabulary``."""
    logprobs = {}
    for rank, token_id in enumerate(wanted, start=1):
        value = by_id.get(token_id) if token_id < vocabulary else -math.inf
        if value is None:
            raise TeacherError("nonsense", f"the teacher's log-probabilities lack the token {token_id}")
        logprobs[token_id] = Logprob(value, rank=rank)
    return logprobs
