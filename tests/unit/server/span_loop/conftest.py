"""The pair that the tests of the span loop drive."""

from collections.abc import Collection
from typing import Any

import pytest

from router.budget import Budget
from router.controller import PriceController
from router.ledger import MemoryLedger
from router.money import PriceList
from router.policy import Policy
from server.cooperation import Cooperation
from server.shared_budgets import SharedBudgets
from tests.helpers.one_teacher import one_teacher
from tests.helpers.scripted_pair import CALIBRATION, Engine, ScriptedTeacher
from tests.helpers.scripted_student import RESERVED, ScriptedLLM


@pytest.fixture
def pair(tokenizer):
    """A function that builds an engine and its teacher: ``pair(ask_at={2}, fails_at=3, span_tokens=4)``."""

    def pair(
        *,
        ask_at: Collection[int] = (),
        ends_at: int | None = None,
        span_tokens: int = 2,
        ask_tokens: int | None = None,
        default: float = 0.5,
        models: dict[str, Any] | None = None,
        on_teacher_error: str = "degrade",
        shared: SharedBudgets | None = None,
        student: dict[str, Any] | None = None,
        prices: PriceList | None = None,
        **teacher: Any,
    ) -> tuple[Engine, ScriptedTeacher]:
        cooperation = Cooperation(
            teachers=one_teacher(scripted := ScriptedTeacher(**teacher), prices),
            policy=Policy(CALIBRATION, expected_tokens=20),
            reserved=RESERVED,
            span_tokens=span_tokens,
            ask_tokens=ask_tokens,
            default_budget=Budget(fraction=default),
            models={name: Budget.model_validate(value) for name, value in (models or {}).items()},
            shared=shared or SharedBudgets(MemoryLedger(), PriceController(CALIBRATION, span_tokens)),
            on_teacher_error=on_teacher_error,
            prices=prices,
        )
        engine = Engine(ScriptedLLM(tokenizer, ask_at, ends_at), cooperation, **(student or {}))
        return engine, scripted

    return pair
