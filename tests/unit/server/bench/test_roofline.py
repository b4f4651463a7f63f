"""The speed of two models on one machine, in numbers that can be computed by hand."""

import json
from dataclasses import replace

import pytest

import wheels
from server.bench.cost_model import Traffic
from server.bench.gpu_evidence import ROWS, core_rows, published_rows
from server.bench.gpu_model import H100, LARGE, LARGE_FP8, QWEN_8, SMALL
from server.bench.roofline import (
    FP8,
    Load,
    Machine,
    Model,
    TooLarge,
    accepted,
    alone,
    best_speculation,
    cooperation,
    speculative,
)

MACHINE = Machine(
    bandwidth=100.0,
    flops=1000.0,
    memory=10_000.0,
    step=1.0,
    draft=0.5,
    call=2.0,
    block=0,
)
STUDENT = Model("student", resident=100, weights=100, flops=0, cache=0)
"""Each of its steps needs the card for 1 s."""
TEACHER = Model("teacher", resident=400, weights=400, flops=1000, cache=0)
"""Each of its steps reads the weights in 4 s, and computes 1 s for a position."""


def load(streams: int = 1, rate: float = 0.0, call_tokens: float = 1.0) -> Load:
    return Load(Traffic(0, 1000, rate, call_tokens), streams)


def test_a_published_shape_has_the_published_size() -> None:
    """Qwen3-8B: 6.95 G weights in layers, 0.62 G in each of two matrices, 8.2 G in all."""
    layers = 36 * (2 * 4096 * (32 + 8) * 128 + 3 * 4096 * 12_288)
    model = QWEN_8.model()
    assert QWEN_8.layer_weights == layers == 6_945_767_424
    assert model.resident == 2 * (layers + 2 * 4096 * 151_936)
    assert model.weights == 2 * (layers + 4096 * 151_936)
    assert model.flops == 2 * (layers + 4096 * 151_936)
    assert model.cache == 2 * 36 * 8 * 128 * 2 == 147_456


def test_fp8_halves_what_layers_read_and_compute() -> None:
    model = QWEN_8.model(FP8)
    matrix = 4096 * 151_936
    assert model.weights == QWEN_8.layer_weights + 2 * matrix
    assert model.flops == QWEN_8.layer_weights + 2 * matrix
    assert model.name == "Qwen3-8B in FP8"


def test_the_slower_of_reading_weights_and_computing_decides() -> None:
    assert MACHINE.work(TEACHER, 2, 2, 0) == 4.0
    assert MACHINE.work(TEACHER, 8, 8, 0) == 8.0
    assert replace(MACHINE, overlaps=False).work(TEACHER, 2, 2, 0) == 4.0 + 2.0


def test_every_request_has_its_own_cache_to_read() -> None:
    """Three requests have 10 tokens before them, with 5 bytes for each token, at 100 bytes/s."""
    cached = replace(TEACHER, cache=5)
    assert MACHINE.work(cached, 3, 3, 10) == 4.0 + 3 * 10 * 5 / 100


def test_one_model_alone_has_the_speed_computed_by_hand() -> None:
    """A step of 1 + 4 s writes a token for each of two requests; prompts take 1 s more."""
    assert alone(MACHINE, TEACHER, load(2)) == pytest.approx(2 / 5)
    assert alone(MACHINE, TEACHER, Load(Traffic(500, 1000, 0.0), 2)) == pytest.approx(2 / (5 + 2 * 0.5))


def test_a_verified_draft_has_the_expected_number_of_tokens() -> None:
    assert accepted(0.5, 2) == 1 + 0.5 + 0.25


def test_speculative_decoding_has_the_speed_computed_by_hand() -> None:
    """Two drafts of 0.5 + 1 s, one step of 1 + 4 s that verifies three positions: 8 s for 1.75 tokens."""
    assert speculative(MACHINE, STUDENT, TEACHER, load(), 0.5, 2) == pytest.approx(1.75 / 8)
    best = best_speculation(MACHINE, STUDENT, TEACHER, load(), 0.5)
    assert best.drafts == 1  # 1.5 tokens in 6.5 s are more
    assert best.tokens_per_second == pytest.approx(1.5 / 6.5)


def test_one_stream_is_at_one_engine_at_a_time() -> None:
    """The teacher writes a quarter in calls of 2 tokens: 6 steps of the student, 2 of the teacher, one call.

    There are 125 calls. The teacher reads 124/125 of the six tokens: it computes (5.952 + 2) / 2 s in a step.
    """
    step = 1 + max(4.0, (6 * (1 - 1 / 125) + 2) / 2)
    assert cooperation(MACHINE, STUDENT, TEACHER, load(1, 0.25, 2)) == pytest.approx(
        8 / (6 * 2 + 2 * step + 2)
    )


def test_two_engines_on_one_card_slow_each_other() -> None:
    apart = replace(MACHINE, one_card=False)
    one = load(1, 0.25, 2)
    many = load(8, 0.25, 2)
    assert cooperation(apart, STUDENT, TEACHER, one) == cooperation(MACHINE, STUDENT, TEACHER, one)
    assert cooperation(apart, STUDENT, TEACHER, many) > 1.05 * cooperation(MACHINE, STUDENT, TEACHER, many)


def test_the_card_is_never_used_for_more_than_all_of_the_time() -> None:
    """All work is known: a token needs its shares of a full step of the student and of the teacher."""
    for streams in (1, 8, 64, 512):
        speed = cooperation(MACHINE, STUDENT, TEACHER, load(streams, 0.25, 2))
        positions = 1 - 1 / 1000  # nearly every token is read or written once by the teacher
        least = 0.75 * 1 / streams + max(0.25 * 4 / streams, positions * 1)
        assert speed * least < 1


def test_a_request_that_does_not_fit_waits() -> None:
    """Each of ten requests has 1,000 bytes of cache. 500 bytes are left for one more, so it waits."""
    cached = replace(TEACHER, cache=2, resident=0)
    small = replace(MACHINE, memory=10_500.0)
    assert load(64).running(small, [cached]) == 10
    with pytest.raises(TooLarge, match="teacher leave no memory"):
        load(1).running(replace(small, memory=999.0), [cached])


def test_models_on_two_cards_have_the_memory_of_each() -> None:
    cached = replace(TEACHER, cache=2, resident=9000)
    both = [cached, cached]
    with pytest.raises(TooLarge):
        load(8).running(MACHINE, both)
    assert load(8).running(replace(MACHINE, one_card=False), both) == 1


def test_published_measurements_on_an_h100_are_explained() -> None:
    ratios = [row["predicted / measured"] for row in published_rows(H100, QWEN_8.model())]
    assert len(ratios) == 23
    assert all(isinstance(ratio, float) and 0.82 < ratio < 1.16 for ratio in ratios)


def test_our_own_measurements_are_explained_within_a_third() -> None:
    rows = core_rows()
    assert [row["side"] for row in rows] == [row.side for row in ROWS]
    for row in rows:
        ratio = row["predicted / measured"]
        assert isinstance(ratio, float)
        assert 0.65 < ratio < 1.2


def test_cooperation_wins_on_an_h100_with_few_streams() -> None:
    """At a rate of 0.1, cooperation is ahead with few streams, and no longer with many."""
    for setting in (SMALL, LARGE_FP8):
        gains = [setting.gain(streams) for streams in (1, 16, 256)]
        assert all(gain is not None for gain in gains)
        one, some, many = (gain or 0.0 for gain in gains)
        assert one > 1.5 > some > 1.1 > many
    assert (LARGE.gain(1) or 0) > 2


def test_the_section_needs_no_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert wheels.main(["bench", "--section", "gpu-model", "--json"]) == 0
    stored = json.loads(capsys.readouterr().out)["gpu-model"]
    assert set(stored["tables"]) == {"speed", "equal", "changes", "published", "core"}
    assert stored["machine"] == {"gpu": "H100 SXM, on paper"}
