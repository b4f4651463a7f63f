"""Constraints on the next tokens, compared with vLLM's own grammars."""

from pathlib import Path
from typing import Any

import pytest

from server.grammar.constraint import Constraint, Grammars
from server.vllm_api import SamplingParams
from server.written import GRAMMAR_FROM
from tests.helpers.grammars import ANN, PERSON, PROMPT_IDS, checked, engine_config, ids, tokenizer_of

BACKENDS = ["xgrammar", "guidance", "outlines"]  # the fourth does not know vLLM's CPU build
END = 1


def constrain(grammars: Grammars, params: SamplingParams, **options: Any) -> Constraint:
    constraint = grammars.constrain("r-0", PROMPT_IDS, params, options)
    assert constraint is not None
    return constraint


async def ready(config: Any, grammars: Grammars, **grammar: Any) -> Constraint:
    constraint = constrain(grammars, checked(config, **grammar))
    assert await constraint.catch_up([])
    return constraint


async def test_a_request_without_structured_output_has_no_constraint(grammars):
    assert grammars.constrain("r-0", PROMPT_IDS, SamplingParams(max_tokens=5), {}) is None


@pytest.mark.parametrize("backend", BACKENDS)
async def test_tokens_are_taken_up_to_the_first_that_the_grammar_refuses(config, grammars, backend):
    constraint = await ready(config, grammars, backend=backend, regex="(red|blue) [0-9]{2}!")
    written = ids("red 42!")
    assert constraint.take([*written[:3], *ids("?"), *written[3:]]) == 3
    assert constraint.take(written[3:]) == len(written) - 3
    assert constraint.take(ids("!")) == 0


@pytest.mark.parametrize("backend", BACKENDS)
async def test_an_end_is_taken_if_the_grammar_may_end_and_then_every_token_is_taken(
    config, grammars, backend
):
    constraint = await ready(config, grammars, backend=backend, regex="[0-9]{1,3}")
    assert constraint.take([END]) == 0
    assert constraint.take(ids("7")) == 1
    assert constraint.unfinished
    assert constraint.take([END]) == 1
    assert not constraint.unfinished
    assert constraint.take([END, *ids("7")]) == 2
    assert constraint.allowed(10_000) is None


async def test_few_ids_are_listed_and_many_are_not(config, grammars):
    constraint = await ready(config, grammars, regex="[0-9][a-z ]*")
    digits = [ids(digit)[0] for digit in "0123456789"]
    assert constraint.allowed(10) == sorted(digits)
    assert constraint.allowed(9) is None
    assert constraint.take(ids("7")) == 1
    assert constraint.allowed(10) is None


async def test_written_tokens_are_taken_once(config, grammars):
    written = ids(ANN)
    params = checked(config, json=PERSON)
    constraint = constrain(grammars, params)
    for length in (2, 2, 5, len(written)):
        assert await constraint.catch_up(written[:length])
    assert constraint.allowed(5) == [END]
    assert params.structured_outputs.json == PERSON


@pytest.mark.parametrize("backend", BACKENDS)
async def test_taken_tokens_that_were_cut_off_are_taken_back(config, grammars, backend):
    """A budget for thinking can cut tokens that a teacher wrote."""
    constraint = await ready(config, grammars, backend=backend, regex="[0-9]{3}")
    assert constraint.take(ids("12")) == 2
    assert await constraint.catch_up(ids("1"))
    assert constraint.take(ids("345")) == 2


async def test_an_unexpected_token_leaves_the_grammar_unusable(config, grammars):
    """Both models follow the same grammar, so after such a token nobody knows what is right."""
    constraint = constrain(grammars, checked(config, json=PERSON))
    assert not await constraint.catch_up(ids("Hello"))
    assert not await constraint.catch_up(ids("Hello, you"))


async def test_a_grammar_that_does_not_compile_is_unusable(config, grammars):
    params = checked(config, regex="[0-9]")
    params.structured_outputs.regex = "["
    constraint = constrain(grammars, params)
    assert not await constraint.catch_up([])
    assert not await constraint.catch_up(ids("7"))
    assert constraint.continuation(3).extra_args == {GRAMMAR_FROM: 3}


async def test_the_whole_grammar_is_sent_until_a_token_is_taken(config, grammars):
    constraint = await ready(config, grammars, json=PERSON)
    assert constraint.fields == {"structured_outputs": {"json": PERSON}}
    constraint.take(ids("{"))
    assert constraint.fields == {}


# Reasoning


@pytest.fixture(scope="module")
def thinking(reasoner: Path) -> Any:
    return engine_config(reasoner, structured_outputs_config={"reasoning_parser": "deepseek_r1"})


@pytest.fixture(scope="module")
def thinking_grammars(thinking: Any) -> Grammars:
    return Grammars(thinking)


def words(model: Path, *tokens: str) -> list[int]:
    found: list[int] = tokenizer_of(model).convert_tokens_to_ids(tokens)
    return found


async def test_reasoning_is_free_and_the_grammar_begins_after_it(thinking, thinking_grammars, reasoner):
    constraint = constrain(thinking_grammars, checked(thinking, regex="yes"))
    think, hm, thought, yes, no = words(reasoner, "<think>", "Hm", "</think>", "yes", "no")
    assert await constraint.catch_up([think])
    assert not constraint.unfinished
    assert constraint.fields == {}
    assert constraint.continuation(3) == ({}, {"reasoning_ended": False})
    assert constraint.take([hm, no, thought, no]) == 3
    assert constraint.unfinished
    assert constraint.fields == {"structured_outputs": {"regex": "yes"}}
    # Three tokens of the prompt, four of the reasoning.
    assert constraint.continuation(3) == ({GRAMMAR_FROM: 7}, {"reasoning_ended": True})
    assert constraint.take([no]) == 0
    assert constraint.take([yes]) == 1


async def test_without_reasoning_the_grammar_holds_from_the_start(thinking, thinking_grammars, reasoner):
    constraint = constrain(thinking_grammars, checked(thinking, regex="yes"), reasoning_ended=True)
    assert await constraint.catch_up([])
    assert constraint.take(words(reasoner, "Hm")) == 0
    assert constraint.take(words(reasoner, "yes")) == 1
