"""The span loop: structured output. Grammars themselves are tested in `tests/unit/server/grammar`."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from vllm.sampling_params import StructuredOutputsParams

from server.completion import Piece
from server.grammar.constraint import Continuation
from server.vllm_api import VLLMValidationError
from server.written import GRAMMAR_FROM
from tests.helpers.scripted_pair import ScriptedTeacher, start, write
from tests.helpers.scripted_student import PROMPT_IDS

JSON = {"structured_outputs": StructuredOutputsParams(json_object=True)}


@dataclass
class ScriptedConstraint:
    """A constraint that takes everything or nothing; its grammar begins after one token of reasoning."""

    usable: bool = True
    opened: list[str] = field(default_factory=list)
    written: list[list[int]] = field(default_factory=list)

    def constrain(self, request_id: str, prompt_ids: list[int], params: Any, options: Any) -> Any:
        self.opened.append(request_id)
        assert prompt_ids == PROMPT_IDS
        return self if params.structured_outputs else None

    async def catch_up(self, token_ids: list[int]) -> bool:
        self.written.append(list(token_ids))
        return self.usable

    def continuation(self, prompt_tokens: int) -> Continuation:
        return Continuation({GRAMMAR_FROM: prompt_tokens + 1}, {"reasoning_ended": True})


async def test_a_segment_that_goes_on_says_where_its_grammar_began(pair):
    constraint = ScriptedConstraint()
    engine, teacher = pair(ask_at={2}, student={"constrain": constraint.constrain})
    result = await write(engine, 0.5, **JSON)
    assert result.text() == "abCDefgh"
    first, second = engine.segments
    assert GRAMMAR_FROM not in first.params.extra_args
    assert "reasoning_ended" not in first.options
    assert second.params.extra_args[GRAMMAR_FROM] == len(PROMPT_IDS) + 1
    assert second.options["reasoning_ended"] is True
    (ask,) = teacher.asks
    assert ask.constraint is constraint
    assert constraint.written == [list(b"ab"), list(b"abCD")]


async def test_every_choice_has_a_grammar_of_its_own(pair):
    constraint = ScriptedConstraint()
    engine, _ = pair(ask_at={2}, student={"constrain": constraint.constrain})
    await write(engine, 0.5, n=2, seed=1, temperature=1.0, **JSON)
    assert constraint.opened == ["r-0", "r-1"]


async def test_without_a_budget_only_vllm_needs_the_grammar(pair):
    constraint = ScriptedConstraint()
    engine, _ = pair(ask_at={2}, student={"constrain": constraint.constrain})
    result = await write(engine, 0, **JSON)
    assert result.text() == "abcdefgh"
    assert constraint.opened == []


@pytest.mark.parametrize("budget", [0.5, 1])
async def test_without_a_usable_grammar_the_student_writes_alone(pair, budget):
    constraint = ScriptedConstraint(usable=False)
    engine, teacher = pair(ask_at={2}, student={"constrain": constraint.constrain})
    result = await write(engine, budget, **JSON)
    assert result.text() == "abcdefgh"
    assert result.report.denied == {"grammar": 1}
    assert teacher.calls == []


@pytest.mark.parametrize("budget", [0.9, 1])
async def test_if_the_teacher_can_write_nothing_the_student_writes_a_token(pair, monkeypatch, budget):
    """Otherwise the teacher would be asked for the same token again and again."""

    async def nothing(*_: Any) -> Piece:
        return Piece([], finish_reason="length")

    monkeypatch.setattr(ScriptedTeacher, "_piece", nothing)
    constraint = ScriptedConstraint()
    engine, teacher = pair(ask_at=range(8), student={"constrain": constraint.constrain})
    result = await write(engine, budget, **JSON)
    assert result.text() == "abcdefgh"
    prefixes = [len(call.prefix) - len(PROMPT_IDS) for call in teacher.calls]
    assert prefixes == list(range(8))
    assert result.report.tokens == 0
    assert engine.spent == [0]


async def test_clients_cannot_set_where_a_grammar_began(pair):
    engine, _ = pair()
    with pytest.raises(VLLMValidationError) as error:
        start(engine, 0, extra_args={GRAMMAR_FROM: 3})
    assert error.value.parameter == "vllm_xargs"
