"""Decisions about a pair before an engine starts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from router.adaptive import AdaptiveCalibration
from router.checkpoint import MERGED_ROUTER, CheckpointError, RouterCheckpoint, fingerprint
from router.gate import LearnedGate
from router.policy import Calibration
from router.reserved import ReservedRows
from server.config import ConfigError, ServeConfig
from server.served_pair import ServedPair

VOCABULARY = {"a": 0, "b": 1, "c": 2}


def configured(directory: Path, **settings: Any) -> ServeConfig:
    return ServeConfig.model_validate({"student": directory, "teacher": "http://teacher"} | settings)


def pair_of(directory: Path, router: RouterCheckpoint | None = None, **settings: Any) -> ServedPair:
    """A pair whose student has ten tokens and four free rows, with its router, if any, merged into it."""
    names = {f"t{i}": i for i in range(10)}
    student(directory, 14, {"model": {"type": "BPE", "vocab": names}})
    if router is not None:
        router.save(directory / MERGED_ROUTER)
    return ServedPair.of(configured(directory, **settings))


def waiting_pair(directory: Path, router: Path, **settings: Any) -> ServedPair:
    """A pair with a student as in `pair_of`, and a directory for a router."""
    pair_of(directory)
    return ServedPair.of(configured(directory, router=router, **settings))


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
        (None, {}, (4, 1)),
        (None, {"span_tokens": 6}, (6, 1)),
        (None, {"span_tokens": 6, "ask_tokens": 2}, (6, 2)),
        ((4, None), {}, (4, 4)),
        ((4, 1), {}, (4, 1)),
        ((4, 1), {"ask_tokens": 2}, (4, 2)),
        ((4, 1), {"span_tokens": 8}, (8, 1)),
    ],
)
def test_spans_come_from_the_configuration_or_else_from_the_router(
    router, tmp_path, of_router, settings, spans
):
    trained = None if of_router is None else with_spans(router, *of_router)
    assert pair_of(tmp_path, trained, **settings).spans == spans


@pytest.mark.parametrize(
    ("of_router", "settings"),
    [(None, {"ask_tokens": 5}), ((4, 4), {"span_tokens": 2}), ((4, 1), {"ask_tokens": 5})],
)
def test_a_call_asks_for_at_most_a_span(router, tmp_path, of_router, settings):
    trained = None if of_router is None else with_spans(router, *of_router)
    with pytest.raises(ConfigError, match=r"ask_tokens: . is more than span_tokens"):
        pair_of(tmp_path, trained, **settings)


# The policy


def test_the_routers_calibration_prices_its_gate(router, tmp_path):
    policy = pair_of(tmp_path, router).policy(400)
    assert policy.calibration == router.calibration("learned")
    assert policy.expected_tokens == router.config.expected_tokens


def test_a_fixed_price_needs_no_calibration(tmp_path):
    policy = pair_of(tmp_path, None, gate="margin", price=-0.5).policy(400)
    assert {policy.calibration.price(rate) for rate in (0.1, 0.5, 0.9)} == {-0.5}
    assert policy.expected_tokens == 100


def test_the_random_gate_needs_no_calibration(tmp_path):
    settings = {"gate": "random", "span_tokens": 4, "ask_tokens": 2}
    policy = pair_of(tmp_path, None, **settings).policy(400)
    assert policy.calibration == Calibration.of_random_gate(2)


@pytest.mark.parametrize("trained", [True, False])
def test_a_gate_without_a_calibration_learns_its_price(router, tmp_path, trained):
    pair = pair_of(tmp_path, router if trained else None, gate="margin")
    assert isinstance(pair.policy(400).calibration, AdaptiveCalibration)
    assert pair.learns_its_price
    assert pair.gate_settings()["wheels"]["sketch"]


def test_a_measured_or_fixed_price_is_not_learned(router, tmp_path):
    assert not pair_of(tmp_path, router).learns_its_price
    assert not pair_of(tmp_path, None, gate="margin", price=-0.5).learns_its_price
    assert not pair_of(tmp_path, None, gate="random").learns_its_price


def test_without_a_router_the_gate_is_one_that_needs_no_training(router, tmp_path):
    assert pair_of(tmp_path, None).gate == "entropy"


def test_with_a_router_the_gate_is_the_learned_one(router, tmp_path):
    assert pair_of(tmp_path, router).gate == "learned"


def test_an_empty_directory_waits_for_a_router(router, tmp_path):
    directory = tmp_path / "coming"
    directory.mkdir()
    pair = waiting_pair(tmp_path, directory)
    assert (pair.gate, pair.learns_its_price) == ("entropy", True)
    taken = pair.with_router(router)
    assert (taken.gate, taken.learns_its_price) == ("learned", False)
    with pytest.raises(ConfigError, match=r"learned gate needs a router checkpoint \(.*coming is empty\)"):
        waiting_pair(tmp_path, directory, gate="learned")
    (directory / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"router\.json is missing"):
        waiting_pair(tmp_path, directory)


def test_learned_prices_are_kept_apart_by_gate_and_spans(tmp_path):
    save_file({"lm_head.weight": torch.zeros(14, 2)}, tmp_path / "model.safetensors")
    files = {
        pair_of(tmp_path, None, gate=gate, span_tokens=span).price_file
        for gate in ("margin", "entropy")
        for span in (4, 8)
    }
    assert len(files) == 4


def test_a_router_that_wants_budgets_in_words_gets_them_with_its_own_gate(router, tmp_path):
    config = router.config.model_copy(update={"budget_prompt": "At most {percent} %. "})
    worded = replace(router, config=config)
    words = pair_of(tmp_path, worded).words
    assert words is not None
    assert words.text(0.1) == "At most 10 %. "
    assert pair_of(tmp_path, worded, gate="margin").words is None
    assert pair_of(tmp_path, router).words is None


def test_a_calibration_is_for_its_own_spans(router, tmp_path):
    assert pair_of(tmp_path, router, span_tokens=8).learns_its_price


# Reserved rows


def test_the_reserved_rows_are_those_of_the_router(router, tmp_path):
    assert pair_of(tmp_path, router).reserved == router.reserved


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"model": {"type": "BPE", "vocab": VOCABULARY}},
        {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0], ["c", -3.0]]}},
        {"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "<end>", "id": 2}]},
    ],
    ids=["bpe", "unigram", "added"],
)
def test_without_a_router_the_reserved_rows_are_the_last_free_ones(tmp_path, tokenizer):
    rows = ServedPair.of(configured(student(tmp_path, 13, tokenizer), gate="random")).reserved
    assert (rows.start, rows.end) == (3, 13)


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ({"tokenizer.json": None}, "no tokenizer.json in"),
        ({"tokenizer.json": "{"}, "tokenizer.json holds no vocabulary"),
        ({"tokenizer.json": "{}"}, "tokenizer.json holds no vocabulary: KeyError 'model'"),
        ({"tokenizer.json": '{"model": {"vocab": [1, 2]}}'}, "tokenizer.json holds no vocabulary"),
        ({"config.json": None}, "config.json"),
        ({"config.json": "[]"}, "config.json must be a mapping of names to values"),
        ({"config.json": "{}"}, "none of lm_head.weight, model.embed_tokens.weight in"),
        ({"config.json": '{"vocab_size": "many"}'}, "config.json: vocab_size is 'many'"),
        (
            {"config.json": '{"is_encoder_decoder": true, "model_type": "t5", "vocab_size": 40}'},
            "is of type t5, which has an encoder",
        ),
        ({"config.json": '{"vocab_size": 3}'}, r"no \*.safetensors weights in"),
    ],
    ids=str,
)
def test_an_unusable_student_is_reported_in_one_line(tmp_path, broken, problem):
    directory = student(tmp_path)
    for name, content in broken.items():
        (directory / name).unlink() if content is None else (directory / name).write_text(content)
    with pytest.raises((ConfigError, CheckpointError), match=problem) as error:
        ServedPair.of(configured(directory, gate="random"))
    assert "\n" not in str(error.value)


def full_student(directory: Path, known: int = 10, config: dict[str, Any] | None = None) -> Path:
    """A student with ten rows, whose tokenizer has this many tokens."""
    directory.mkdir(exist_ok=True)
    student(directory, 10, {"model": {"type": "BPE", "vocab": {f"t{i}": i for i in range(known)}}})
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    matrix = torch.arange(40.0).view(10, 4)
    save_file({"model.embed_tokens.weight": matrix}, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("known", [10, 12])
def test_a_student_without_spare_rows_gets_some_in_the_gateways_own_copy(tmp_path, known):
    original = full_student(tmp_path / "student", known)
    pair = ServedPair.of(configured(original, gate="margin", price=0.0, cache=tmp_path / "cache"))
    assert pair.reserved == ReservedRows(known, 32)
    assert pair.visible == 10  # even if the tokenizer has ids without a row in the model
    assert pair.student.parent == tmp_path / "cache" / "merged"
    assert json.loads((pair.student / "config.json").read_text())["vocab_size"] == known + 32
    matrix = load_file(pair.student / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(matrix[:10], torch.arange(40.0).view(10, 4))
    assert torch.equal(matrix[10:], torch.zeros(known + 22, 4))
    assert json.loads((original / "config.json").read_text())["vocab_size"] == 10


def test_a_copy_is_made_once_and_again_for_another_configuration(tmp_path):
    original = full_student(tmp_path / "student")
    settings = configured(original, gate="random", cache=tmp_path / "cache")
    first = ServedPair.of(settings).student
    made = (first / "model.safetensors").stat().st_ino
    assert ServedPair.of(settings).student == first
    assert (first / "model.safetensors").stat().st_ino == made
    (original / "config.json").write_text('{"vocab_size": 10, "rope_theta": 5}')
    second = ServedPair.of(settings).student
    assert second != first
    assert json.loads((second / "config.json").read_text()) == {"vocab_size": 42, "rope_theta": 5}


@pytest.mark.parametrize(
    "config",
    [
        {"text_config": {"vocab_size": 10}},
        {"text_config": {}, "tie_word_embeddings": True},
        {"text_config": {"vocab_size": 10}, "vocab_size": 10},
    ],
    ids=str,
)
def test_a_nested_configuration_has_the_new_size(tmp_path, config):
    original = full_student(tmp_path / "student", config=config)
    pair = ServedPair.of(configured(original, gate="random", cache=tmp_path / "cache"))
    written = json.loads((pair.student / "config.json").read_text())
    assert written["text_config"]["vocab_size"] == 42
    assert written.get("vocab_size", 42) == 42
    assert ("vocab_size" in written) == ("vocab_size" in config)


def test_a_router_brings_the_rows_that_the_student_lacks(router, tmp_path):
    original = full_student(tmp_path / "student")
    config = router.config.model_copy(
        update={
            "reserved_count": 32,
            "fingerprints": router.config.fingerprints.model_copy(
                update={"student": fingerprint(original, 10)}
            ),
        }
    )
    taps = torch.ones(31, 4)
    gate = LearnedGate(ReservedRows(10, 32), config.gate_width).state_dict()
    replace(router, config=config, taps=taps, gate=gate).save(tmp_path / "router")
    pair = ServedPair.of(configured(original, router=tmp_path / "router", cache=tmp_path / "cache"))
    assert (pair.reserved, pair.visible) == (ReservedRows(10, 32), 10)
    matrix = load_file(pair.student / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(matrix[11:], taps)
    assert json.loads((pair.student / "config.json").read_text())["vocab_size"] == 42
    assert ServedPair.of(configured(pair.student)).reserved == pair.reserved


def test_rows_without_a_token_are_known(router, tmp_path):
    """Ten tokens are below the reserved rows. Then three of them are unknown to the tokenizer."""
    assert pair_of(tmp_path, router).visible == 10
    names = {f"t{i}": i for i in range(7)}
    student(tmp_path, 14, {"model": {"type": "BPE", "vocab": names}})
    pair = ServedPair.of(configured(tmp_path))
    assert (pair.visible, pair.reserved) == (7, router.reserved)
    assert pair.gate_settings()["wheels"] == {
        "reserved": [10, 4],
        "gate": "learned",
        "router": str(tmp_path / MERGED_ROUTER),
        "visible": 7,
    }


def test_a_tokenizer_of_another_kind_hides_no_rows(router, tmp_path):
    pair_of(tmp_path, router)
    (tmp_path / "tokenizer.json").unlink()
    assert ServedPair.of(configured(tmp_path)).visible == 10


# Another router


def test_another_router_brings_its_spans_and_its_policy(router, tmp_path):
    pair = pair_of(tmp_path, router)
    other = with_spans(router, 8, 2)
    changed = pair.with_router(other)
    assert (changed.spans, changed.router) == ((8, 2), other)
    assert changed.policy(400).calibration == other.calibration("learned")


def test_another_router_that_does_not_fit_is_refused(router, tmp_path):
    pair = pair_of(tmp_path, router, ask_tokens=3)
    with pytest.raises(CheckpointError, match="ask_tokens: 3 is more than span_tokens, which is 2"):
        pair.with_router(with_spans(router, 2, 1))


def test_another_router_without_a_calibration_is_refused(router, tmp_path):
    pair = pair_of(tmp_path, router)
    other = replace(router, config=router.config.model_copy(update={"calibration": {}}))
    with pytest.raises(CheckpointError, match="it has no calibration for the gate learned"):
        pair.with_router(other)
    assert pair.checked_policy(400) == pair.policy(400)


# The aim


def test_an_aim_at_the_rate_uses_the_spare_prices(router, tmp_path):
    spares = {"learned": [(0.1, 1.0), (0.3, 0.5)]}
    trained = replace(router, config=router.config.model_copy(update={"spare": spares}))
    assert pair_of(tmp_path, trained).policy(400).spare is None
    policy = pair_of(tmp_path, trained, aim="rate").policy(400)
    assert policy.spare == Calibration(((0.1, 1.0), (0.3, 0.5)))
    assert policy.calibration == router.calibration("learned")


def test_an_aim_without_measured_prices_is_refused(router, tmp_path):
    with pytest.raises(ConfigError, match="aim rate: the router has no calibration for gate 'learned'"):
        pair_of(tmp_path, router, aim="rate").policy(400)
    with pytest.raises(ConfigError, match="aim rate needs a router"):
        pair_of(tmp_path, None, aim="rate", gate="margin", price=1.0).policy(400)


# Several teachers

TWO = {"teacher": {"small": "http://small", "big": "http://big"}}


def test_a_router_of_several_teachers_prices_each(router_of_two, tmp_path):
    pair = pair_of(tmp_path, router_of_two, **TWO)
    assert pair.gate_settings()["wheels"]["teachers"] == 2
    policy = pair.policy(400)
    assert policy.calibration == router_of_two.calibration()
    assert policy.outputs == router_of_two.outputs
    assert policy.outputs[0].alone == Calibration(((0.1, 1.5), (0.3, 0.5)))


@pytest.mark.parametrize("settings", [{"price": 0.5}, {"ask_tokens": 2}])
def test_without_the_routers_calibration_an_outputs_own_price_is_not_known(router_of_two, settings, tmp_path):
    policy = pair_of(tmp_path, router_of_two, **TWO, **settings).policy(400)
    assert [(output.teacher, output.alone) for output in policy.outputs] == [("small", None), ("big", None)]


@pytest.mark.parametrize(
    "teacher", ["http://teacher", {"small": "http://small", "huge": "http://huge"}, {"big": "http://big"}]
)
def test_a_router_of_other_teachers_is_refused(router_of_two, teacher, tmp_path):
    with pytest.raises(CheckpointError, match="the router chooses between the teachers small, big, and here"):
        pair_of(tmp_path, router_of_two, teacher=teacher)


def test_tools_are_no_teachers_of_a_router(router_of_two, tmp_path):
    teacher = {**TWO["teacher"], "calculator": {"tool": "http://calculator"}}
    assert len(pair_of(tmp_path, router_of_two, teacher=teacher).policy(400).outputs) == 2


def test_with_another_gate_the_routers_teachers_do_not_matter(router_of_two, tmp_path):
    pair = pair_of(tmp_path, router_of_two, gate="margin")
    assert pair.policy(400).outputs == ()


def test_another_router_is_for_the_same_teachers(router, router_of_two, tmp_path):
    with pytest.raises(CheckpointError, match="here the models are teacher"):
        pair_of(tmp_path, router).with_router(router_of_two)
    changed = pair_of(tmp_path, router, **TWO).with_router(router_of_two)
    assert changed.policy(400).outputs == router_of_two.outputs
    assert changed.with_router(router).policy(400).outputs == ()
