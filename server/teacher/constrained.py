"""Checks a teacher's tokens by a grammar, because a stock server cannot continue a grammar."""

from dataclasses import replace

from server.grammar.constraint import Constraint
from server.teacher.carried import Screened
from server.vllm_api import SamplingParams

MOST_ALLOWED = 1000
"""Most allowed ids that are sent to the teacher; vLLM takes 1,024."""


def next_ids(constraint: Constraint, params: SamplingParams) -> list[int] | None:
    """The ids that grammar and caller allow for the next token; None if they are too many to be sent."""
    allowed = constraint.allowed(MOST_ALLOWED)
    if allowed is None or params.allowed_token_ids is None:
        return allowed
    return [token_id for token_id in allowed if token_id in params.allowed_token_ids]


def constrained(screened: Screened, constraint: Constraint) -> Screened:
    """A piece up to the first token that the grammar refuses; the constraint advances by the kept tokens.

    If the teacher ends the completion before the grammar has ended, only the span ends.
    """
    piece = screened.piece
    taken = constraint.take(piece.token_ids)
    if taken < len(piece.token_ids):
        return Screened(piece.up_to(taken), again=True, banned=piece.token_ids[taken])
    if piece.finish_reason == "stop" and constraint.unfinished:
        return screened._replace(piece=replace(piece, finish_reason="length", stop_reason=None))
    return screened
