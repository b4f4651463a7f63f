"""Any family of models can be a student, also without a row to spare."""

import pytest
import torch
from families import FAMILIES, ROWS, load, write

from router.checkpoint import Fingerprints, RouterCheckpoint, RouterConfig, fingerprint
from router.gate import LearnedGate
from router.reserved import ReservedRows
from router.rows import append_rows, vocabulary_rows

IDS = torch.tensor([[3, 14, 15, 92, 65, 35]])
APPENDED = ReservedRows(ROWS)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def original(family, tmp_path_factory):
    return write(family, tmp_path_factory.mktemp("original"))


def router_for(student, width):
    """Its taps are random."""
    torch.manual_seed(1)
    config = RouterConfig(
        reserved_start=APPENDED.start,
        reserved_count=APPENDED.count,
        gate_width=8,
        span_tokens=4,
        expected_tokens=20.0,
        calibration={"learned": [(0.1, 4.0), (0.3, 2.0)]},
        fingerprints=Fingerprints(student=fingerprint(student, ROWS), tokenizer="0", teacher="0"),
    )
    taps = torch.randn(APPENDED.count - 1, width)
    return RouterCheckpoint(config, taps, LearnedGate(APPENDED, 8).state_dict())


def test_more_rows_change_no_logit_of_the_others(family, original, tmp_path):
    append_rows(original, tmp_path / "copy", APPENDED)
    assert vocabulary_rows(tmp_path / "copy") == APPENDED.end
    assert fingerprint(tmp_path / "copy", ROWS) == fingerprint(original, ROWS)
    before, after = load(family, original)(IDS).logits, load(family, tmp_path / "copy")(IDS).logits
    assert after.shape[-1] == APPENDED.end
    torch.testing.assert_close(after[..., :ROWS], before, atol=1e-5, rtol=1e-5)
    assert not after[..., ROWS:].any()


def test_a_router_is_merged_into_rows_that_the_student_did_not_have(family, original, tmp_path):
    model = load(family, original)
    router = router_for(original, model.get_output_embeddings().weight.shape[1])
    router.merge(original, tmp_path / "merged")
    router.check_student(tmp_path / "merged")
    merged = load(family, tmp_path / "merged")
    assert torch.equal(merged.get_output_embeddings().weight[APPENDED.taps], router.taps)
    ours = merged(IDS).logits
    torch.testing.assert_close(ours[..., :ROWS], model(IDS).logits, atol=1e-5, rtol=1e-5)
    assert ours[..., APPENDED.taps].abs().min() > 0
