"""English values with digits, and all the ways in which German spells them out.

Each kind draws an English value with its German alternatives. The spelling is by num2words, and the names of
months and days are by Babel. This file adds the grammar around them (Uhr, halb, Viertel vor, Komma, inflected
ordinals).
"""

import random
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from babel.dates import get_day_names, get_month_names
from num2words import num2words


class Value(NamedTuple):
    """A value that fills a place in a sentence."""

    english: str
    german: tuple[str, ...]
    """All right ways to say the value."""


MONTHS = list(zip(get_month_names(locale="en").values(), get_month_names(locale="de").values(), strict=True))
DAYS = list(zip(get_day_names(locale="en").values(), get_day_names(locale="de").values(), strict=True))
SMALL = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


@lru_cache(maxsize=1 << 16)
def cardinal(n: int) -> str:
    """The cardinal number in German; 14 is "vierzehn"."""
    if 1000 <= n < 100_000:  # most numbers of the task; num2words is slow for them
        rest = n % 1000
        return f"{before_noun(n // 1000)}tausend{cardinal(rest) if rest else ''}"
    return num2words(n, lang="de")


@lru_cache(maxsize=1 << 16)
def cardinals(n: int) -> tuple[str, ...]:
    """All right cardinals: "einhundertzwei" and "hundertzwei", "eintausend..." and "tausend..."."""
    word = cardinal(n)
    if 100 <= n < 200 or 1000 <= n < 2000:
        return (word, word.removeprefix("ein"))
    return (word,)


@lru_cache(maxsize=1 << 12)
def year_word(n: int) -> str:
    """The number of a year in German; 1848 is "achtzehnhundertachtundvierzig"."""
    return num2words(n, lang="de", to="year")


@lru_cache(maxsize=1 << 10)
def ordinal(n: int) -> str:
    """The ordinal in weak inflection, as after "am", "dem" or "im", e.g. "dritten"."""
    return num2words(n, lang="de", to="ordinal") + "n"


def digits(text: str) -> str:
    """The digits of a text, spelled one by one."""
    return " ".join(map(cardinal, map(int, text)))


def before_noun(n: int) -> str:
    """The cardinal as it is said before a masculine or neuter noun."""
    return "ein" if n == 1 else cardinal(n)


def small(rng: random.Random) -> Value:
    """A number from two to twelve, in words in both languages."""
    n = rng.randrange(2, 13)
    return Value(SMALL[n - 2], (cardinal(n),))


def whole(low: int, high: int) -> Callable[[random.Random], Value]:
    """A function that draws numbers with `low` to `high` digits, every length equally often.

    No number ends with 01, because its gender would depend on the noun.
    """

    def draw(rng: random.Random) -> Value:
        size = rng.randint(low, high)
        n = rng.randrange(10 ** (size - 1), 10**size)
        if size > 2 and rng.random() < 0.4:
            n -= n % 100 if rng.random() < 0.5 else n % 10
        n += n % 100 == 1
        return Value(f"{n:,}", cardinals(n))

    return draw


def decimal(rng: random.Random) -> Value:
    """A number with one or two digits after the point."""
    n = rng.randrange(1, 100)
    places = rng.choice((1, 1, 2))
    fraction = f"{rng.randrange(1, 10**places):0{places}d}"
    return Value(f"{n}.{fraction}", (f"{cardinal(n)} Komma {digits(fraction)}",))


def percent(rng: random.Random) -> Value:
    """A percentage: a whole number or a decimal."""
    if rng.random() < 0.5:
        return decimal(rng)
    n = rng.randrange(2, 100)
    return Value(str(n), (cardinal(n),))


def degrees(rng: random.Random) -> Value:
    """A temperature, also below zero."""
    n = rng.choice((*range(-20, -1), *range(2, 40)))
    return Value(str(n), (f"minus {cardinal(-n)}" if n < 0 else cardinal(n),))


def digit_string(rng: random.Random) -> Value:
    """Three to five digits that are read one by one."""
    text = "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 5)))
    return Value(text, (digits(text),))


def years(low: int, high: int) -> Callable[[random.Random], Value]:
    """A function that draws years from `low` to `high` - 1."""

    def draw(rng: random.Random) -> Value:
        n = rng.randrange(low, high)
        return Value(str(n), (year_word(n),))

    return draw


early_year = years(1100, 1600)
late_year = years(1600, 2000)
recent_year = years(2001, 2030)


def year(rng: random.Random) -> Value:
    """A year of any time, most of them after 1600."""
    return rng.choice((early_year, late_year, late_year, recent_year))(rng)


def floor(rng: random.Random) -> Value:
    """An ordinal, e.g. of a floor in a building."""
    n = rng.randrange(2, 60)
    suffix = "th" if 10 < n % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return Value(f"{n}{suffix}", (ordinal(n),))


def date(rng: random.Random) -> Value:
    """A date for use after "am" or "vom", sometimes with a year."""
    number = rng.randrange(12)
    english, german = MONTHS[number]
    day = rng.randint(1, (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)[number])
    source = rng.choice((f"{english} {day}", f"{day} {english}"))
    target = f"{ordinal(day)} {german}"
    if rng.random() < 0.35:
        the_year = year(rng)
        spelled = the_year.german[0]
        return Value(
            f"{source}, {the_year.english}", (f"{target} {spelled}", f"{target} des Jahres {spelled}")
        )
    return Value(source, (target,))


def clock(rng: random.Random) -> Value:
    """A time of day: official ("vierzehn Uhr dreißig") and, if there is one, colloquial ("halb drei")."""
    hour = rng.randint(1, 23)
    minute = rng.choice((0, 15, 30, 45, rng.randrange(5, 60, 5), rng.randrange(1, 60)))
    english = f"{hour}:{minute:02d}"
    if rng.random() < 0.5:
        english = f"{(hour - 1) % 12 + 1}:{minute:02d} {'am' if hour < 12 else 'pm'}"
    official = f"{before_noun(hour)} Uhr" + (f" {cardinal(minute)}" if minute else "")
    present = cardinal((hour - 1) % 12 + 1)
    following = cardinal(hour % 12 + 1)
    spoken = {
        5: f"fünf nach {present}",
        10: f"zehn nach {present}",
        15: f"Viertel nach {present}",
        20: f"zwanzig nach {present}",
        25: f"fünf vor halb {following}",
        30: f"halb {following}",
        35: f"fünf nach halb {following}",
        40: f"zwanzig vor {following}",
        45: f"Viertel vor {following}",
        50: f"zehn vor {following}",
        55: f"fünf vor {following}",
    }
    return Value(english, (official, spoken[minute]) if minute in spoken else (official,))


CURRENCIES = (("€", "Euro", "Cent"), ("$", "Dollar", "Cent"), ("£", "Pfund", "Pence"))


def price(rng: random.Random) -> Value:
    """An amount of money, usually with hundredths."""
    sign, unit, hundredth = rng.choice(CURRENCIES)
    whole_units = rng.randrange(1, 1000 if rng.random() < 0.25 else 100)
    hundredths = rng.randrange(2, 100)
    if rng.random() < 0.2:
        return Value(f"{sign}{whole_units}", (f"{before_noun(whole_units)} {unit}",))
    amount = f"{before_noun(whole_units)} {unit}"
    rest = cardinal(hundredths)
    source = f"{sign}{whole_units}.{hundredths:02d}"
    return Value(source, (f"{amount} {rest}", f"{amount} und {rest} {hundredth}"))


def fortune(rng: random.Random) -> Value:
    """A large amount of money, in whole units."""
    sign, unit, _ = rng.choice(CURRENCIES)
    number = whole(4, 5)(rng)
    return Value(f"{sign}{number.english}", tuple(f"{spelled} {unit}" for spelled in number.german))


def day(rng: random.Random) -> Value:
    """A day of the week."""
    english, german = rng.choice(DAYS)
    return Value(english, ("Samstag", "Sonnabend") if german == "Samstag" else (german,))


def month(rng: random.Random) -> Value:
    """The name of a month."""
    english, german = rng.choice(MONTHS)
    return Value(english, (german,))
