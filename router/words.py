"""Budgets in words: the text that tells a student its budget, and its place in the prompt.

Training and gateway follow the same rules, so a student reads what it was trained on. A teacher never reads
the words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter


@dataclass(frozen=True)
class BudgetWords:
    """The template of one router, and the fractions that it knows."""

    template: str
    """Text with the one field `{percent}`."""
    fractions: Sequence[float]
    """Fractions that the router was calibrated for: it knows no others in words."""

    def __post_init__(self) -> None:
        check_budget_prompt(self.template)
        if not self.fractions:
            raise ValueError("budgets in words: no fraction was calibrated")

    def text(self, rate: float) -> str | None:
        """The words that the student reads if the teacher may write this share of the tokens.

        They name the nearest fraction that the router knows. None at 0 and at 1: the student has nothing to
        decide there.
        """
        if not 0 < rate < 1:
            return None
        return budget_text(self.template, min(self.fractions, key=lambda fraction: abs(fraction - rate)))


def check_budget_prompt(template: str) -> str:
    """The template itself. Raises ValueError unless `{percent}` is its only field."""
    try:
        fields = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"budget_prompt {template!r}: {error}") from error
    if fields != {"percent"}:
        raise ValueError(f"budget_prompt {template!r}: it must have exactly one field, {{percent}}")
    return template


def budget_text(template: str, fraction: float) -> str:
    """The words for a fraction, in [0, 1], of completion tokens that the teacher may write."""
    return template.format(percent=f"{100 * fraction:g}")


def turn_of_words(roles: Sequence[str]) -> int | None:
    """Index of the turn that begins with the words: the user's last one, else the system's last one.

    None if the conversation has neither.
    """
    for role in ("user", "system"):
        places = [place for place, each in enumerate(roles) if each == role]
        if places:
            return places[-1]
    return None
