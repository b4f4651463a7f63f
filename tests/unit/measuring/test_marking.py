"""Completions for people, with the teacher's spans marked."""

from measuring.marking import marked

IDS = [3, 4, 5, 6, 0]


def letters(ids: list[int]) -> str:
    """Decode ids as letters; 0 is the end of sequence, which has no text."""
    return "".join(chr(ord("a") + token) for token in ids if token)


def pieces(ids: list[int]) -> str:
    """Decode ids of which two are one character, so a prefix may end inside it."""
    return "é" * (len(ids) // 2) + "\ufffd" * (len(ids) % 2)


def test_without_colour_the_teachers_part_is_in_brackets():
    assert marked(letters, IDS, [(0, 1), (2, 4)], colour=False).plain == "⟦d⟧e⟦fg⟧"
    assert marked(letters, IDS, [], colour=False).plain == "defg"
    assert marked(letters, IDS, [(4, 5)], colour=False).plain == "defg"  # its end of sequence has no text


def test_the_teachers_part_is_coloured():
    text = marked(letters, IDS, [(0, 1), (2, 4)], colour=True)
    assert text.plain == "defg"
    assert [(span.start, span.end) for span in text.spans] == [(0, 1), (2, 4)]
    assert all("yellow" in span.style for span in text.spans)


def test_a_character_belongs_to_the_writer_of_its_last_token():
    assert marked(pieces, [1, 1, 1, 1], [(1, 3)], colour=False).plain == "⟦é⟧é"
