"""Checks a text from another model against the request's rules for the student's tokens."""

from server.choice import Choice
from server.completion import Piece
from server.teacher.carried import Screen


def allowed_ids(choice: Choice, ids: list[int]) -> list[int]:
    """The student's ids before the first one that ends a bad word, or that a grammar refuses."""
    screen = Screen(bad_words=choice.params.bad_words_token_ids or ())
    before = choice.completion.token_ids[-screen.reach :] if screen.reach else ()
    kept = list(screen.apply(Piece(ids), before).piece.token_ids)
    return kept if choice.constraint is None else kept[: choice.constraint.take(kept)]


def may_end(choice: Choice) -> bool:
    """Whether the completion may end here."""
    if choice.min_tokens:
        return False
    return choice.constraint is None or all(map(choice.constraint.allows, choice.end_ids))
