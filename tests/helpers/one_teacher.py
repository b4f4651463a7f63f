"""The teachers of a gateway that has a single teacher without a name."""

from typing import Any

from router.money import PriceList
from server.sources import TEACHER
from server.teacher.teachers import NamedTeacher, Teachers
from server.teacher.translation import Translator


def one_teacher(pool: Any, prices: PriceList | None = None, translator: Translator | None = None) -> Teachers:
    """Teachers with this pool, which may be scripted, as the only one."""
    own = None if prices is None else prices.of_teacher(TEACHER)
    return Teachers([NamedTeacher(TEACHER, pool, own, lambda: translator)])
