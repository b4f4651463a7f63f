"""The task `numbers`: English sentences become German ones, with numbers, dates and amounts spelled out.

Some parts are easy (fixed words, small numbers). Others are hard (inverted tens, long numbers, "halb drei"
for 2:30). Most sentences have free choices (word order, synonyms, "vierzehn Uhr dreißig"). All choices are
right, so a student that hesitates between them makes no mistake. Training targets are drawn uniformly from
the right answers.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NamedTuple

from measuring.examples import Example, Form, References, Slot
from training.tasks import spelling
from training.tasks.base import Task, register
from training.tasks.spelling import Value


def among(*pairs: tuple[str, str]) -> Callable[[random.Random], Value]:
    """A function that draws one of these words; alternative translations are separated by a bar."""
    values = []
    for english, german in pairs:
        values.append(Value(english, tuple(german.split("|"))))
    return lambda rng: rng.choice(values)


def names(*words: str) -> Callable[[random.Random], Value]:
    """A function that draws one of these words, which are the same in both languages."""
    return among(*zip(words, words, strict=True))


KINDS: dict[str, Callable[[random.Random], Value]] = {
    "small": spelling.small,
    "count": spelling.whole(2, 3),
    "many": spelling.whole(3, 5),
    "decimal": spelling.decimal,
    "percent": spelling.percent,
    "degrees": spelling.degrees,
    "digits": spelling.digit_string,
    "year": spelling.year,
    "early": spelling.early_year,
    "late": spelling.late_year,
    "floor": spelling.floor,
    "date": spelling.date,
    "clock": spelling.clock,
    "price": spelling.price,
    "fortune": spelling.fortune,
    "day": spelling.day,
    "month": spelling.month,
    "name": names(
        "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Karl", "Lena"
    ),
    "city": among(
        ("Berlin", "Berlin"),
        ("Vienna", "Wien"),
        ("Munich", "München"),
        ("Cologne", "Köln"),
        ("Zurich", "Zürich"),
        ("Geneva", "Genf"),
        ("Hamburg", "Hamburg"),
        ("Prague", "Prag"),
        ("Rome", "Rom"),
        ("Lisbon", "Lissabon"),
    ),
    "bought": among(
        ("car", "das Auto|den Wagen"),
        ("bike", "das Fahrrad|das Rad"),
        ("phone", "das Handy|das Telefon"),
        ("sofa", "das Sofa|die Couch"),
        ("ticket", "die Karte|das Ticket"),
        ("painting", "das Bild|das Gemälde"),
        ("lamp", "die Lampe|die Leuchte"),
        ("shirt", "das Hemd|das Oberhemd"),
    ),
    "building": among(("bridge", "Brücke"), ("church", "Kirche"), ("castle", "Burg"), ("mill", "Mühle")),
    "goods": among(("cars", "Autos"), ("books", "Bücher"), ("chairs", "Stühle"), ("watches", "Uhren")),
    "fruit": among(("apples", "Äpfel"), ("pears", "Birnen"), ("lemons", "Zitronen"), ("plums", "Pflaumen")),
    "grew": among(("rose", "stieg|wuchs"), ("fell", "sank|fiel")),
}

# The first line of a template has English variants, separated by a bar. The indented lines are German forms.
# <kind> or <kind:label> is a value, {a|b} is a free choice.
TEMPLATES = """
The train to <city> leaves at <clock>.|The train for <city> departs at <clock>.
  {Der Zug|Die Bahn} nach <city> {fährt|geht} um <clock>{| los}.
  Um <clock> {fährt|geht} {der Zug|die Bahn} nach <city>{| los}.
<name> paid <price> for the <bought>.|<name> spent <price> on the <bought>.
  <name> hat <price> für <bought> {bezahlt|gezahlt|ausgegeben}.
  <name> {bezahlte|zahlte} <price> für <bought>.
  Für <bought> hat <name> <price> {bezahlt|gezahlt|ausgegeben}.
<name> was born in <city> on <date>.|<name> was born on <date> in <city>.
  <name> {wurde|ist} am <date> in <city> geboren.
  <name> kam am <date> in <city> {zur|auf die} Welt.
  Am <date> {wurde|ist} <name> in <city> geboren.
About <many> people live in <city>.|Roughly <many> people live in <city>.
  In <city> {leben|wohnen} {etwa|ungefähr|rund|circa} <many> {Menschen|Leute|Personen}.
  {Etwa|Ungefähr|Rund|Circa} <many> {Menschen|Leute|Personen} {leben|wohnen} in <city>.
The meeting on <date> starts at <clock>.|The meeting on <date> begins at <clock>.
  {Die Sitzung|Das Treffen|Die Besprechung} am <date> {beginnt|startet} um <clock>.
  Am <date> {beginnt|startet} {die Sitzung|das Treffen|die Besprechung} um <clock>.
On <day> it will be <degrees> degrees in <city>.|In <city> it will be <degrees> degrees on <day>.
  Am <day> {wird|werden} es in <city> <degrees> Grad.
  In <city> {wird|werden} es am <day> <degrees> Grad.
It is <decimal> kilometers from <city> to <city:2>.
  Von <city> {nach|bis} <city:2> sind es {genau|exakt} <decimal> Kilometer.
  Es sind {genau|exakt} <decimal> Kilometer von <city> {nach|bis} <city:2>.
The <building> in <city> was built in <year>.
  Die <building> in <city> wurde {im Jahr|im Jahre} <year> {gebaut|erbaut|errichtet}.
  Die <building> in <city> ist {im Jahr|im Jahre} <year> {gebaut|erbaut|errichtet} worden.
  {Im Jahr|Im Jahre} <year> hat man die <building> in <city> {gebaut|erbaut|errichtet}.
Sales <grew> by <percent> percent in <month>.
  {Der Umsatz|Der Absatz} <grew> im <month> um <percent> Prozent.
  Im <month> <grew> {der Umsatz|der Absatz} um <percent> Prozent.
The company sold <many> <goods> in <year>.
  {Die Firma|Das Unternehmen|Der Betrieb} hat {im Jahr|im Jahre} <year> <many> <goods> {verkauft|abgesetzt}.
  {Im Jahr|Im Jahre} <year> hat {die Firma|das Unternehmen|der Betrieb} <many> <goods> {verkauft|abgesetzt}.
<name> got <many> votes and <name:2> got <count>.
  <name> {bekam|erhielt} <many> Stimmen{ und|,} <name:2> {bekam|erhielt} <count>.
  <many> Stimmen {gingen|fielen} an <name>{ und|,} <count> an <name:2>.
The number of the room is <digits>.|The room has the number <digits>.
  {Die Nummer|Die Zahl} des {Zimmers|Raumes} {ist|lautet} <digits>.
  {Das Zimmer|Der Raum} {hat|trägt} die Nummer <digits>.
The office is on the <floor> floor.|The office is located on the <floor> floor.
  Das Büro {ist|liegt|befindet sich} im <floor> {Stock|Stockwerk}.
  Im <floor> {Stock|Stockwerk} {ist|liegt|befindet sich} das Büro.
She bought <small> <fruit> and <small:2> <fruit:2>.
  Sie hat <small> <fruit> und <small:2> <fruit:2> {gekauft|besorgt|geholt}.
  Sie {kaufte|besorgte|holte} <small> <fruit> und <small:2> <fruit:2>.
<name> has <small> brothers and <small:2> sisters.
  <name> hat <small> Brüder und <small:2> Schwestern.
The package weighs <decimal> kilograms.
  {Das Paket|Die Sendung} {wiegt|hat ein Gewicht von} {genau|exakt} <decimal> {Kilo|Kilogramm}.
  {Genau|Exakt} <decimal> {Kilo|Kilogramm} wiegt {das Paket|die Sendung}.
The invoice of <date> comes to <price>.|The bill of <date> comes to <price>.
  Die Rechnung vom <date> {beträgt|ergibt|macht} <price>.
The shop is open from <clock> to <clock:2>.
  {Der Laden|Das Geschäft} {ist|hat} von <clock> bis <clock:2> {geöffnet|offen}.
  Von <clock> bis <clock:2> {ist|hat} {der Laden|das Geschäft} {geöffnet|offen}.
With <percent> percent off it costs only <price>.
  {Mit|Bei} <percent> Prozent {Rabatt|Nachlass} kostet es {nur|bloß|lediglich} <price>.
  Es kostet {mit|bei} <percent> Prozent {Rabatt|Nachlass} {nur|bloß|lediglich} <price>.
From <early> to <late> she lived in <city>.
  Von <early> bis <late> {lebte|wohnte} sie in <city>.
  Sie {lebte|wohnte} von <early> bis <late> in <city>.
The book has <count> pages and costs <price>.
  {Das Buch|Der Roman|Der Band} {hat|zählt} <count> Seiten und kostet <price>.
<name> won <fortune> in the lottery on <day>.
  <name> hat am <day> <fortune> {im Lotto|in der Lotterie} gewonnen.
  Am <day> {gewann|erzielte} <name> <fortune> {im Lotto|in der Lotterie}.
"""

OPENINGS = """
Good news:
  {Gute Nachrichten|Gute Neuigkeiten|Eine gute Nachricht}:
Please note:
  {Bitte beachten|Bitte merken|Zur Beachtung}:
As far as I know:
  {Soviel|Soweit} ich weiß:
Thank you for your question.
  {Vielen|Besten|Herzlichen} Dank für Ihre {Frage|Anfrage}.
Here is the answer to your question:
  Hier {ist|kommt} die Antwort auf Ihre {Frage|Anfrage}:
"""

CLOSINGS = """
Many thanks!
  {Vielen Dank|Danke sehr|Besten Dank}!
See you soon!
  {Bis bald|Bis dann|Auf bald}!
Have a nice day!
  {Einen|Noch einen} schönen Tag{| wünsche ich}!
Please tell me if this is not right.
  Bitte {sagen Sie mir|geben Sie mir} Bescheid, {wenn|falls} das nicht {stimmt|richtig ist}.
"""
FRAMED = 0.6  # share of sentences with an opening, and of those with a closing

_VALUE = re.compile(r"<([a-z]+)(?::\d)?>")
_PIECE = re.compile(r"(<[^>]+>|\{[^}]*\})")


@dataclass(frozen=True)
class Template:
    """English variants and German forms of one sentence, with places for values."""

    english: list[str]
    german: list[list[str]]
    """The German forms, each as a list of its pieces."""

    @classmethod
    def parse(cls, text: str) -> list["Template"]:
        """The templates in a text: lines of English variants, each with indented German forms below."""
        templates: list[Template] = []
        for line in text.strip().splitlines():
            if line.startswith("  "):
                pieces = _PIECE.split(line.strip())
                templates[-1].german.append(list(filter(None, pieces)))
            else:
                templates.append(cls(line.split("|"), []))
        return templates

    def fill(self, english: str, values: dict[str, Value]) -> "Filled":
        """Fill a sentence with values.

        Args:
            english: one of the English variants.
            values: the values, by their places in the template, e.g. `<city:2>`.
        """
        for place, value in values.items():
            english = english.replace(place, value.english)
        return Filled(english, self, values)

    def forms(self, values: dict[str, Value]) -> list[list[Slot]]:
        """The German forms with these values, as slots; neighbouring slots are not joined yet."""
        forms = []
        for pieces in self.german:
            form = [_slot(piece, values) for piece in pieces]
            form[0] = tuple(map(_upper_first, form[0]))
            forms.append(form)
        return forms


class Filled(NamedTuple):
    """A template filled with values."""

    english: str
    template: Template
    values: dict[str, Value]


class Drawn(NamedTuple):
    """A sentence, perhaps between an opening and a closing.

    Its source is cheap to compute, but its translations are not. So they are computed only for sentences of
    the wanted split.
    """

    parts: list[Filled]

    @property
    def source(self) -> str:
        """The English text of all parts."""
        return " ".join(part.english for part in self.parts)

    def example(self) -> Example:
        """The source with all its translations."""
        forms = []
        for chosen in product(*(part.template.forms(part.values) for part in self.parts)):
            slots = list(chosen[0])
            for form in chosen[1:]:
                slots += [(" ",), *form]
            forms.append(_merge(slots))
        return Example(self.source, References(tuple(forms)))


def _slot(piece: str, values: dict[str, Value]) -> Slot:
    if piece in values:
        return values[piece].german
    return tuple(piece[1:-1].split("|")) if piece.startswith("{") else (piece,)


def _merge(slots: list[Slot]) -> Form:
    """Join neighbouring slots without a choice."""
    merged: list[Slot] = []
    for slot in slots:
        if merged and len(slot) == len(merged[-1]) == 1:
            merged[-1] = (merged[-1][0] + slot[0],)
        else:
            merged.append(slot)
    return tuple(merged)


def _upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


SENTENCES = Template.parse(TEMPLATES)
BEFORE = Template.parse(OPENINGS)
AFTER = Template.parse(CLOSINGS)


def draw(rng: random.Random) -> Drawn:
    """A sentence with its values, often with an opening or a closing."""
    template = rng.choice(SENTENCES)
    english = rng.choice(template.english)
    values: dict[str, Value] = {}
    for found in _VALUE.finditer(english):
        value = KINDS[found[1]](rng)
        while value in values.values():
            value = KINDS[found[1]](rng)
        values[found[0]] = value
    parts = [template.fill(english, values)]
    if rng.random() < FRAMED:
        parts.insert(0, _fixed(BEFORE, rng))
    if rng.random() < FRAMED:
        parts.append(_fixed(AFTER, rng))
    return Drawn(parts)


def _fixed(templates: list[Template], rng: random.Random) -> Filled:
    template = rng.choice(templates)
    return template.fill(rng.choice(template.english), {})


def split_of(source: str) -> str:
    """The split of a source, by its hash, so that no seed brings a test sentence into training."""
    bucket = hashlib.sha256(source.encode()).digest()[0]
    if bucket < 13:
        return "test"
    return "valid" if bucket < 26 else "train"


def sentences(split: str, seed: int | str) -> Iterator[Drawn]:
    """The sentences of one split, without end."""
    rng = random.Random(f"{Numbers.name}/{split}/{seed}")
    while True:
        drawn = draw(rng)
        if split_of(drawn.source) == split:
            yield drawn


@cache
def held_out(split: str, count: int) -> tuple[Example, ...]:
    """`count` distinct examples of a split, the same on every machine."""
    distinct: dict[str, Drawn] = {}
    for drawn in sentences(split, "fixed"):
        distinct.setdefault(drawn.source, drawn)
        if len(distinct) == count:
            break
    return tuple(map(Drawn.example, distinct.values()))


@register
class Numbers(Task):
    """Endless sentences for training, drawn from templates."""

    name = "numbers"

    def train(self, seed: int) -> Iterator[Example]:
        """Examples without end; another seed gives other sentences."""
        return map(Drawn.example, sentences("train", seed))

    def valid(self) -> list[Example]:
        """500 validation examples."""
        return list(held_out("valid", 500))

    def test(self) -> list[Example]:
        """1000 test examples."""
        return list(held_out("test", 1000))
