"""The recipe for a pretrained pair, computed: its memory on one card, and its hours."""

import pytest

from server.bench.gpu_model import QWEN_06, QWEN_8
from tests.helpers.paths import ROOT
from tests.helpers.real_sizes import CARD, STAGES, adapters, student_stage, table, weights


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_every_stage_fits_on_the_card_and_ends_within_four_hours(stage):
    found = stage()
    assert found.memory < CARD
    assert found.hours < 4


def test_sizes_are_those_of_the_models():
    """The published sizes are 0.6 and 8.2 billion weights, 0.44 and 6.95 of them without the embedding."""
    assert weights(QWEN_06) == pytest.approx(0.6e9, rel=0.02)
    assert weights(QWEN_8) == pytest.approx(8.2e9, rel=0.02)
    # A layer: 4 matrices of attention, 3 of the feed-forward part; inputs and outputs of each.
    inputs = 1024 + 1024 + 1024 + 2048 + 1024 + 1024 + 3072
    outputs = 2048 + 1024 + 1024 + 1024 + 3072 + 3072 + 1024
    assert adapters(QWEN_06, 32) == 28 * 32 * (inputs + outputs)
    assert student_stage().parts["teacher"] == 2 * weights(QWEN_8)


def test_the_page_has_the_table():
    assert table() in (ROOT / "docs" / "results" / "real-sizes.md").read_text()
