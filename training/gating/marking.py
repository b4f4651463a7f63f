"""A completion for people, with the teacher's part marked."""

from itertools import groupby

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from training.gating.rollout import Rollout
from training.tokenizer import decode_answer


def marked(tokenizer: PreTrainedTokenizerBase, completion: Rollout, colour: bool) -> Text:
    """The completion's text, the teacher's part of it coloured, or in brackets."""

    def offset(tokens: int) -> int:  # a prefix may end inside a character, which then reads U+FFFD
        return len(decode_answer(tokenizer, completion.tokens[:tokens]).rstrip("\ufffd"))

    whole = decode_answer(tokenizer, completion.tokens)
    text = Text()
    start = 0
    written = 0
    for by_teacher, stretch in groupby(completion.by_teacher):
        written += len(list(stretch))
        end = offset(written)
        _append(text, whole[start:end], by_teacher, colour)
        start = end
    return text


def _append(text: Text, piece: str, by_teacher: bool, colour: bool) -> None:
    """Add what one of the models wrote in one stretch."""
    if not by_teacher or not piece:
        text.append(piece)
    elif colour:
        text.append(piece, style="bold black on yellow")
    else:
        text.append(f"⟦{piece}⟧")
