"""A model of any family can be a student, even without a spare row."""

import pytest
import torch

from router.checkpoint import fingerprint
from router.rows import append_rows, vocabulary_rows
from tests.helpers.families import APPENDED, FAMILIES, NOT_IN_VLLM, ROWS, load, router_for, write
from tests.helpers.paths import ROOT

IDS = torch.tensor([[3, 14, 15, 92, 65, 35]])
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def original(family, tmp_path_factory):
    return write(family, tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def model(family, original):
    return load(family, original)


def test_more_rows_change_no_logit_of_the_others(family, original, model, tmp_path):
    append_rows(original, tmp_path / "copy", APPENDED)
    assert vocabulary_rows(tmp_path / "copy") == APPENDED.end
    assert fingerprint(tmp_path / "copy", ROWS) == fingerprint(original, ROWS)
    before, after = model(IDS).logits, load(family, tmp_path / "copy")(IDS).logits
    assert after.shape[-1] == APPENDED.end
    torch.testing.assert_close(after[..., :ROWS], before, atol=1e-5, rtol=1e-5)
    assert not after[..., ROWS:].any()


def test_a_router_is_merged_into_rows_that_the_student_did_not_have(family, original, model, tmp_path):
    router = router_for(original)
    router.merge(original, tmp_path / "merged")
    router.check_student(tmp_path / "merged")
    merged = load(family, tmp_path / "merged")
    assert torch.equal(merged.get_output_embeddings().weight[APPENDED.taps], router.taps)
    ours = merged(IDS).logits
    torch.testing.assert_close(ours[..., :ROWS], model(IDS).logits, atol=1e-5, rtol=1e-5)
    assert ours[..., APPENDED.taps].abs().min() > 0


def test_the_documented_families_are_those_that_are_tested():
    section = (ROOT / "docs" / "api.md").read_text().split("\n## Model families\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ")][2:]
    documented = {name.strip(): (config.strip(" `"), note.strip()) for name, config, note in rows}
    assert {name: config for name, (config, _) in documented.items()} == {
        name: config for name, (config, _) in FAMILIES.items()
    }
    assert {name for name, (_, note) in documented.items() if note} == set(NOT_IN_VLLM)
