"""What the gateway makes of its configuration before anything starts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from router.checkpoint import CheckpointError, RouterCheckpoint
from router.policy import Calibration
from server.config import ConfigError, ServeConfig
from server.gateway import _policy, _reserved_rows, _spans

VOCABULARY = {"a": 0, "b": 1, "c": 2}


def configured(directory: Path, **settings: Any) -> ServeConfig:
    return ServeConfig.model_validate({"student": directory, "teacher": "http://teacher"} | settings)


def with_spans(router: RouterCheckpoint, span_tokens: int, ask_tokens: int | None) -> RouterCheckpoint:
    config = router.config.model_copy(update={"span_tokens": span_tokens, "ask_tokens": ask_tokens})
    return replace(router, config=config)


def student(directory: Path, vocab_size: int | None = 40, tokenizer: Any = None) -> Path:
    config = {} if vocab_size is None else {"vocab_size": vocab_size}
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = tokenizer or {"model": {"type": "BPE", "vocab": VOCABULARY}}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return directory


# Spans


@pytest.mark.parametrize(
    ("of_router", "settings", "spans"),
    [
        (None, {}, (1, 1)),
        (None, {"span_tokens": 6}, (6, 6)),
        (None, {"span_tokens": 6, "ask_tokens": 2}, (6, 2)),
        ((4, None), {}, (4, 4)),
        ((4, 1), {}, (4, 1)),
        ((4, 1), {"ask_tokens": 2}, (4, 2)),
        ((4, 1), {"span_tokens": 8}, (8, 1)),
    ],
)
def test_spans_are_the_configurations_else_the_routers(router, tmp_path, of_router, settings, spans):
    trained = None if of_router is None else with_spans(router, *of_router)
    assert _spans(configured(tmp_path, **settings), trained) == spans


@pytest.mark.parametrize(
    ("of_router", "settings"),
    [(None, {"ask_tokens": 2}), ((4, 4), {"span_tokens": 2}), ((4, 1), {"ask_tokens": 5})],
)
def test_nobody_asks_for_more_than_a_span(router, tmp_path, of_router, settings):
    trained = None if of_router is None else with_spans(router, *of_router)
    with pytest.raises(ConfigError, match=r"ask_tokens: . is more than a span of"):
        _spans(configured(tmp_path, **settings), trained)


# The policy


def test_the_routers_calibration_prices_its_gate(router, tmp_path):
    policy = _policy(configured(tmp_path), router, max_len=400)
    assert policy.calibration == router.calibration("learned")
    assert policy.expected_tokens == router.config.expected_tokens


def test_a_fixed_price_needs_no_calibration(tmp_path):
    policy = _policy(configured(tmp_path, gate="margin", price=-0.5), None, max_len=400)
    assert {policy.calibration.price(rate) for rate in (0.1, 0.5, 0.9)} == {-0.5}
    assert policy.expected_tokens == 100


def test_the_random_gate_needs_no_calibration(tmp_path):
    settings = {"gate": "random", "span_tokens": 4, "ask_tokens": 2}
    policy = _policy(configured(tmp_path, **settings), None, max_len=400)
    assert policy.calibration == Calibration.of_random_gate(2)


def test_a_gate_without_a_calibration_is_refused(router, tmp_path):
    for trained in (None, router):
        with pytest.raises(ConfigError, match=r"the gate margin is not calibrated .* or a fixed --price"):
            _policy(configured(tmp_path, gate="margin"), trained, max_len=400)


def test_a_router_that_wants_budgets_in_words_is_refused(router, tmp_path):
    config = router.config.model_copy(update={"budget_prompt": "At most {percent} %. "})
    with pytest.raises(ConfigError, match="budgets in words"):
        _policy(configured(tmp_path), replace(router, config=config), 512)


def test_a_calibration_is_for_its_own_spans(router, tmp_path):
    with pytest.raises(ConfigError, match="not calibrated for this pair and spans of 8"):
        _policy(configured(tmp_path, span_tokens=8), router, max_len=400)


# Reserved rows


def test_the_routers_rows(router, tmp_path):
    assert _reserved_rows(router, tmp_path) == router.reserved


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"model": {"type": "BPE", "vocab": VOCABULARY}},
        {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0], ["c", -3.0]]}},
        {"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "<end>", "id": 2}]},
    ],
    ids=["bpe", "unigram", "added"],
)
def test_without_a_router_the_last_rows_that_the_tokenizer_leaves_free(tmp_path, tokenizer):
    rows = _reserved_rows(None, student(tmp_path, 13, tokenizer))
    assert (rows.start, rows.end) == (3, 13)


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ({"tokenizer.json": None}, "no tokenizer.json in"),
        ({"tokenizer.json": "{"}, "tokenizer.json holds no vocabulary"),
        ({"tokenizer.json": "{}"}, "tokenizer.json holds no vocabulary: KeyError 'model'"),
        ({"tokenizer.json": '{"model": {"vocab": [1, 2]}}'}, "tokenizer.json holds no vocabulary"),
        ({"config.json": None}, "config.json"),
        ({"config.json": "{}"}, "config.json has no 'vocab_size'"),
        ({"config.json": '{"vocab_size": 3}'}, "no spare row for the escalation token"),
    ],
    ids=str,
)
def test_a_student_that_is_not_usable_is_said_in_one_line(tmp_path, broken, problem):
    directory = student(tmp_path)
    for name, content in broken.items():
        (directory / name).unlink() if content is None else (directory / name).write_text(content)
    with pytest.raises((ConfigError, CheckpointError), match=problem) as error:
        _reserved_rows(None, directory)
    assert "\n" not in str(error.value)


# The aim


def test_who_aims_at_the_rate_gets_the_spare_prices(router, tmp_path):
    spares = {"learned": [(0.1, 1.0), (0.3, 0.5)]}
    trained = replace(router, config=router.config.model_copy(update={"spare": spares}))
    assert _policy(configured(tmp_path), trained, max_len=400).spare is None
    policy = _policy(configured(tmp_path, aim="rate"), trained, max_len=400)
    assert policy.spare == Calibration(((0.1, 1.0), (0.3, 0.5)))
    assert policy.calibration == router.calibration("learned")


def test_an_aim_that_nothing_was_measured_for_is_refused(router, tmp_path):
    with pytest.raises(ConfigError, match="aim rate: the router has no calibration for gate 'learned'"):
        _policy(configured(tmp_path, aim="rate"), router, max_len=400)
    with pytest.raises(ConfigError, match="aim rate needs a router"):
        _policy(configured(tmp_path, aim="rate", gate="margin", price=1.0), None, max_len=400)
