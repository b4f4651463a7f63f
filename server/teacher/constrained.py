"""A teacher under a grammar. A stock server cannot continue one, so its tokens are checked here."""

from dataclasses import replace

from server.grammar.constraint import Constraint
from server.teacher.carried import Screened
from server.vllm_api import SamplingParams

MOST_ALLOWED = 1000
"""Up to this many ids that a grammar leaves are sent; vLLM takes 1,024."""


def next_ids(constraint: Constraint, params: SamplingParams) -> list[int] | None:
    """What the grammar and the caller leave for the next token; None where that is too much to be sent."""
    allowed = constraint.allowed(MOST_ALLOWED)
    if allowed is None or params.allowed_token_ids is None:
        return allowed
    return [token_id for token_id in allowed if token_id in params.allowed_token_ids]


def constrained(screened: Screened, constraint: Constraint) -> Screened:
    """A piece up to the first token that the grammar refuses; the constraint advances by what is left.

    A server may end a completion by what is no end to the student. Then only the span ends.
    """
    piece = screened.piece
    taken = constraint.take(piece.token_ids)
    if taken < len(piece.token_ids):
        return Screened(piece.up_to(taken), again=True, banned=piece.token_ids[taken])
    if piece.finish_reason == "stop" and constraint.unfinished:
        return screened._replace(piece=replace(piece, finish_reason="length", stop_reason=None))
    return screened
