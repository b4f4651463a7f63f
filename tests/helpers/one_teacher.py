"""The teachers of a gateway that has one, without a name of its own."""

from typing import Any

from router.money import PriceList
from server.sources import TEACHER
from server.teacher.teachers import NamedTeacher, Teachers
from server.teacher.translation import Translator


def one_teacher(pool: Any, prices: PriceList | None = None, translator: Translator | None = None) -> Teachers:
    """``pool`` may be a scripted one."""
    own = None if prices is None else prices.of_teacher(TEACHER)
    return Teachers([NamedTeacher(TEACHER, pool, own, lambda: translator)])
