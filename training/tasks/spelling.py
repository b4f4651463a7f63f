"""English values with digits, and all the ways in which German spells them out.

Each kind draws `(english, german alternatives)`. Spelling is num2words', names of months and days are
Babel's; what stands here is only the grammar around them (Uhr, halb, Viertel vor, Komma, inflected ordinals).
"""

import random
from collections.abc import Callable
from functools import lru_cache

from babel.dates import get_day_names, get_month_names
from num2words import num2words

Value = tuple[str, tuple[str, ...]]

MONTHS = list(zip(get_month_names(locale="en").values(), get_month_names(locale="de").values(), strict=True))
DAYS = list(zip(get_day_names(locale="en").values(), get_day_names(locale="de").values(), strict=True))
SMALL = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


@lru_cache(maxsize=1 << 16)
def cardinal(n: int) -> str:
    return num2words(n, lang="de")


@lru_cache(maxsize=1 << 16)
def cardinals(n: int) -> tuple[str, ...]:
    """ "einhundertzwei" and "hundertzwei", "eintausend..." and "tausend...": both are right."""
    word = cardinal(n)
    if 100 <= n < 200 or 1000 <= n < 2000:
        return word, word.removeprefix("ein")
    return (word,)


@lru_cache(maxsize=1 << 12)
def year_word(n: int) -> str:
    return num2words(n, lang="de", to="year")


@lru_cache(maxsize=1 << 10)
def ordinal(n: int) -> str:
    """Weak inflection, as after "am", "dem", "im": "dritten"."""
    return num2words(n, lang="de", to="ordinal") + "n"


def digits(text: str) -> str:
    return " ".join(cardinal(int(digit)) for digit in text)


def before_noun(n: int) -> str:
    return "ein" if n == 1 else cardinal(n)


def small(rng: random.Random) -> Value:
    n = rng.randrange(2, 13)
    return SMALL[n - 2], (cardinal(n),)


def whole(low: int, high: int) -> Callable[[random.Random], Value]:
    """Numbers of low to high digits, every length equally often; never ...01, whose gender depends on the
    noun.
    """

    def draw(rng: random.Random) -> Value:
        size = rng.randint(low, high)
        n = rng.randrange(10 ** (size - 1), 10**size)
        if size > 2 and rng.random() < 0.4:
            n -= n % 100 if rng.random() < 0.5 else n % 10
        n += n % 100 == 1
        return f"{n:,}", cardinals(n)

    return draw


def decimal(rng: random.Random) -> Value:
    n, places = rng.randrange(1, 100), rng.choice((1, 1, 2))
    fraction = f"{rng.randrange(1, 10**places):0{places}d}"
    return f"{n}.{fraction}", (f"{cardinal(n)} Komma {digits(fraction)}",)


def percent(rng: random.Random) -> Value:
    if rng.random() < 0.5:
        return decimal(rng)
    n = rng.randrange(2, 100)
    return str(n), (cardinal(n),)


def degrees(rng: random.Random) -> Value:
    n = rng.choice([n for n in range(-20, 40) if abs(n) > 1])
    return str(n), (f"minus {cardinal(-n)}" if n < 0 else cardinal(n),)


def digit_string(rng: random.Random) -> Value:
    text = "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 5)))
    return text, (digits(text),)


def years(low: int, high: int) -> Callable[[random.Random], Value]:
    def draw(rng: random.Random) -> Value:
        n = rng.randrange(low, high)
        return str(n), (year_word(n),)

    return draw


early_year, late_year, recent_year = years(1100, 1600), years(1600, 2000), years(2001, 2030)


def year(rng: random.Random) -> Value:
    return rng.choice((early_year, late_year, late_year, recent_year))(rng)


def floor(rng: random.Random) -> Value:
    n = rng.randrange(2, 60)
    suffix = "th" if 10 < n % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}", (ordinal(n),)


def date(rng: random.Random) -> Value:
    """For use after "am" or "vom"."""
    number = rng.randrange(12)
    english, german = MONTHS[number]
    day = rng.randint(1, (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)[number])
    source, target = rng.choice((f"{english} {day}", f"{day} {english}")), f"{ordinal(day)} {german}"
    if rng.random() < 0.35:
        in_year, (spelled, *_) = year(rng)
        return f"{source}, {in_year}", (f"{target} {spelled}", f"{target} des Jahres {spelled}")
    return source, (target,)


def clock(rng: random.Random) -> Value:
    """Official ("vierzehn Uhr dreißig") or, where there is one, colloquial ("halb drei")."""
    hour, minute = (
        rng.randint(1, 23),
        rng.choice((0, 15, 30, 45, rng.randrange(5, 60, 5), rng.randrange(1, 60))),
    )
    english = f"{hour}:{minute:02d}"
    if rng.random() < 0.5:
        english = f"{(hour - 1) % 12 + 1}:{minute:02d} {'am' if hour < 12 else 'pm'}"
    official = f"{before_noun(hour)} Uhr" + (f" {cardinal(minute)}" if minute else "")
    this, following = cardinal((hour - 1) % 12 + 1), cardinal(hour % 12 + 1)
    spoken = {
        5: f"fünf nach {this}",
        10: f"zehn nach {this}",
        15: f"Viertel nach {this}",
        20: f"zwanzig nach {this}",
        25: f"fünf vor halb {following}",
        30: f"halb {following}",
        35: f"fünf nach halb {following}",
        40: f"zwanzig vor {following}",
        45: f"Viertel vor {following}",
        50: f"zehn vor {following}",
        55: f"fünf vor {following}",
    }
    return english, (official, spoken[minute]) if minute in spoken else (official,)


CURRENCIES = (("€", "Euro", "Cent"), ("$", "Dollar", "Cent"), ("£", "Pfund", "Pence"))


def price(rng: random.Random) -> Value:
    sign, unit, hundredth = rng.choice(CURRENCIES)
    whole_units, hundredths = rng.randrange(1, 1000 if rng.random() < 0.25 else 100), rng.randrange(2, 100)
    if rng.random() < 0.2:
        return f"{sign}{whole_units}", (f"{before_noun(whole_units)} {unit}",)
    amount, rest = f"{before_noun(whole_units)} {unit}", cardinal(hundredths)
    return f"{sign}{whole_units}.{hundredths:02d}", (f"{amount} {rest}", f"{amount} und {rest} {hundredth}")


def fortune(rng: random.Random) -> Value:
    sign, unit, _ = rng.choice(CURRENCIES)
    english, german = whole(4, 5)(rng)
    return f"{sign}{english}", tuple(f"{spelled} {unit}" for spelled in german)


def day(rng: random.Random) -> Value:
    english, german = rng.choice(DAYS)
    return english, ("Samstag", "Sonnabend") if german == "Samstag" else (german,)


def month(rng: random.Random) -> Value:
    english, german = rng.choice(MONTHS)
    return english, (german,)
