"""Grammars in the student's engine, whose requests are segments of a completion."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from router.reserved import ReservedRows
from server.gate_processor import SETTINGS
from server.grammar.manager import (
    EngineGrammars,
    GrammarManager,
    install_scheduler,
    open_rows,
    scheduler,
)
from server.grammar.strings import CHARACTER, without_control_characters
from server.vllm_api import EngineRequest, StructuredOutputManager
from server.written import GRAMMAR_FROM
from tests.helpers.grammars import ANN, PERSON, PROMPT_IDS, checked, engine_config, ids, segment

BACKENDS = ["xgrammar", "guidance", "outlines"]

RESERVED = ReservedRows(start=480, count=32)


def engine_grammars(config: Any) -> EngineGrammars:
    manager = StructuredOutputManager(config)
    EngineGrammars.take_over(manager, RESERVED)
    assert isinstance(manager, EngineGrammars)
    return manager


@pytest.fixture(scope="module")
def manager(config: Any) -> EngineGrammars:
    return engine_grammars(config)


def compiled(manager: StructuredOutputManager, request: EngineRequest) -> Any:
    """The request's grammar, compiled as the engine compiles it."""
    manager.grammar_init(request)
    request.structured_output_request._grammar.exception(timeout=60)
    return request.structured_output_request.grammar


def mask(manager: StructuredOutputManager, request: EngineRequest) -> Any:
    """The mask of the request's next token."""
    return manager.grammar_bitmask({"r-0": request}, ["r-0"], {}).copy()


def allowed(bitmask: Any) -> list[int]:
    ids: list[int] = np.flatnonzero(np.unpackbits(bitmask.view(np.uint8), bitorder="little")).tolist()
    return ids


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_segment_goes_on_where_the_grammar_of_the_one_before_ended(config, manager, backend):
    written = ids(ANN)
    whole = segment(checked(config, backend=backend, json=PERSON))
    grammar = compiled(manager, whole)
    for length in range(len(written) + 1):
        params = checked(config, backend=backend, json=PERSON, extra_args={GRAMMAR_FROM: len(PROMPT_IDS)})
        continued = segment(params, written[:length])
        compiled(manager, continued)
        assert np.array_equal(mask(manager, continued), mask(manager, whole)), written[:length]
        if length < len(written):
            assert grammar.accept_tokens("r-0", written[length : length + 1])


def test_reasoning_before_the_grammar_is_not_fed_to_it(config, manager):
    reasoning = ids("so")
    params = checked(config, json=PERSON, extra_args={GRAMMAR_FROM: len(PROMPT_IDS) + len(reasoning)})
    continued = segment(params, [*reasoning, *ids('{"name')])
    assert not isinstance(compiled(manager, continued), Exception)


def test_a_segment_whose_prefix_the_grammar_refuses_ends_with_an_error(config, manager):
    """The same holds for a grammar that cannot be compiled: nothing is written without its grammar."""
    params = checked(config, json=PERSON, extra_args={GRAMMAR_FROM: len(PROMPT_IDS)})
    error = compiled(manager, segment(params, ids("Hello")))
    assert isinstance(error, ValueError)
    assert "refuses the text that is already" in str(error)


def test_the_mask_opens_the_rows_of_the_gate_and_no_others(config, manager):
    params = checked(config, json=PERSON)
    ours, theirs = segment(params), segment(params)
    compiled(manager, ours)
    stock = StructuredOutputManager(config)
    compiled(stock, theirs)
    opened = np.unpackbits((mask(manager, ours) ^ mask(stock, theirs)).view(np.uint8), bitorder="little")
    assert np.flatnonzero(opened).tolist() == list(range(480, 512))


def test_rows_stay_closed_if_min_tokens_forbids_all_that_the_grammar_allows(config, manager):
    """vLLM can then allow only an end, and it checks whether anything else is open."""
    params = checked(config, regex="[0-9]", extra_args={GRAMMAR_FROM: len(PROMPT_IDS)})
    at_the_end = segment(params, ids("7"))
    compiled(manager, at_the_end)
    assert RESERVED.start in allowed(mask(manager, at_the_end))
    params.min_tokens = 5
    assert allowed(mask(manager, at_the_end)) == [1]
    before = segment(params)
    compiled(manager, before)
    assert RESERVED.start in allowed(mask(manager, before))


def test_rows_that_cross_a_word_of_the_mask_are_opened():
    bits = np.zeros((2, 3), dtype=np.int32)
    open_rows(bits, ReservedRows(start=62, count=4))
    opened = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")
    assert [np.flatnonzero(row).tolist() for row in opened] == [[62, 63, 64, 65]] * 2


def test_the_grammar_does_not_take_the_escalation_token(config, manager):
    request = segment(checked(config, json=PERSON))
    grammar = compiled(manager, request)
    assert manager.accept_tokens(request, [*ids("{"), RESERVED.escalation])
    assert manager.accept_tokens(request, [RESERVED.escalation])
    assert grammar.validate_tokens(ids('"name')) == ids('"name')
    assert not manager.accept_tokens(request, ids("x"))


def test_every_request_has_the_backend_that_its_schema_needs(config):
    """The second schema has a rule that xgrammar does not know. vLLM alone would ignore the rule."""
    manager = GrammarManager(config)
    even = {"type": "integer", "multipleOf": 2, "minimum": 10, "maximum": 99}
    first, second = checked(config, json=PERSON), checked(config, json=even)
    assert [params.structured_outputs._backend for params in (first, second)] == ["xgrammar", "guidance"]
    compiled(manager, segment(first))
    grammar = compiled(manager, segment(second))
    assert grammar.accept_tokens("r-0", ids("4"))
    assert (grammar.validate_tokens(ids("2")), grammar.validate_tokens(ids("3"))) == (ids("2"), [])


def test_the_operators_setting_for_white_space_holds_for_tool_calls_too(config):
    """vLLM itself applies the setting to plain JSON only."""
    content = {"type": "json_schema", "json_schema": PERSON}
    call = {"type": "tag", "begin": "<call>", "content": content, "end": "</call>"}
    tag = json.dumps({"type": "structural_tag", "format": call})
    params = checked(config, structural_tag=tag)
    texts = {spaces: f'<call>{{{" " * spaces}"name": "Ann"' for spaces in range(4)}
    for forbidden, expected in ((False, [0, 1, 2, 3]), (True, [0, 1])):
        settings = {"backend": "xgrammar", "disable_any_whitespace": forbidden}
        manager = engine_grammars(engine_config(structured_outputs_config=settings))
        accepted = []
        for spaces, text in texts.items():
            if compiled(manager, segment(params)).accept_tokens("r-0", ids(text)):
                accepted.append(spaces)
        assert accepted == expected


@pytest.mark.parametrize("called", [False, True], ids=["json", "tool call"])
@pytest.mark.parametrize(
    ("text", "accepted"),
    [("abc", True), ("a\u00e4", True), ("abcd", False), ("a", False), ("a\tb", False), ("a\x01", False)],
)
def test_no_string_of_a_bounded_length_has_control_characters(config, manager, called, text, accepted):
    """xgrammar by itself accepts the tab, which no JSON parser accepts."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "minLength": 2, "maxLength": 3}}}
    content = {"type": "json_schema", "json_schema": schema | {"required": ["a"]}}
    tag = {"type": "tag", "begin": "", "content": content, "end": ""}
    sent = {"structural_tag": json.dumps({"type": "structural_tag", "format": tag})}
    params = checked(config, **(sent if called else {"json": schema | {"required": ["a"]}}))
    grammar = compiled(manager, segment(params))
    assert grammar.accept_tokens("r-0", ids(f'{{"a": "{text}"')) is accepted


def test_values_that_look_like_schemas_stay_as_they_are():
    looks = {"type": "string", "maxLength": 2}
    schema = {"enum": [looks], "properties": {"a": {"const": looks}, "b": looks, "c": {"type": "string"}}}
    pattern = f"^{CHARACTER}{{0,2}}$"
    expected = {"a": {"const": looks}, "b": {"type": "string", "pattern": pattern}, "c": {"type": "string"}}
    assert without_control_characters(schema) == {"enum": [looks], "properties": expected}
    for left in ({"pattern": "a"}, {"minLength": 3}, {"minLength": "1"}, {"format": "date"}):
        assert without_control_characters(looks | left) == looks | left


@pytest.mark.parametrize("theirs", [None, "types.SimpleNamespace"])
def test_the_engine_gets_vllms_scheduler_or_the_one_that_the_operator_set(theirs):
    config = engine_config(scheduler_cls=theirs, additional_config={SETTINGS: {"reserved": [480, 32]}})
    install_scheduler(config)
    make = config.scheduler_config.get_scheduler_cls()
    assert make is scheduler
    if theirs is None:
        return
    manager = StructuredOutputManager(config)
    made = make(vllm_config=config, structured_output_manager=manager, block_size=16)
    assert isinstance(made, SimpleNamespace)
    assert (made.structured_output_manager, made.block_size) == (manager, 16)
    assert isinstance(manager, EngineGrammars)
