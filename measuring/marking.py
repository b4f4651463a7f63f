"""Shows people a completion with the teacher's spans marked: in colour, or in brackets."""

from collections.abc import Callable, Sequence

from rich.text import Text

STYLE = "bold black on yellow"


def marked(
    decode: Callable[[list[int]], str],
    token_ids: list[int],
    spans: Sequence[tuple[int, int]],
    *,
    colour: bool,
) -> Text:
    """The text of a completion, with the teacher's spans marked.

    Args:
        decode: turns token ids into text.
        token_ids: token ids of the completion.
        spans: [start, end) token offsets of the teacher's spans, in order.
        colour: whether to mark with colour; if False, spans are in brackets.
    """
    whole = decode(token_ids)

    def offset(tokens: int) -> int:
        # A prefix may end inside a character, which is then decoded as U+FFFD.
        return len(decode(token_ids[:tokens]).rstrip("\ufffd"))

    text = Text()
    shown = 0
    for first_token, end_token in spans:
        start = offset(first_token)
        end = offset(end_token)
        text.append(whole[shown:start])
        text.append_text(mark(whole[start:end], colour=colour))
        shown = end
    return text.append(whole[shown:])


def mark(text: str, *, colour: bool) -> Text:
    """A text by the teacher, marked; an empty one is not."""
    if not text:
        return Text()
    return Text(text, style=STYLE) if colour else Text(f"⟦{text}⟧")
