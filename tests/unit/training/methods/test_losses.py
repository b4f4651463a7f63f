"""Losses, in numbers that can be computed by hand."""

import pytest
import torch

from training.batches import Batch
from training.method_config import KDConfig, PCLConfig
from training.methods import KD, PCL
from training.methods.gkd import generalised_jsd
from training.methods.kd import forward_kl
from training.methods.pcl import all_actions_loss, path_residuals

torch.set_num_threads(1)  # tiny models: threads only wait for each other


def test_path_residuals_are_computed_as_by_hand():
    ratio, row = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([0, 0, 0, 1, 1])
    assert path_residuals(ratio, row, 1).tolist() == [1, 2, 4, 8, 16]
    assert path_residuals(ratio, row, 2).tolist() == [3, 6, 4, 24, 16]
    assert path_residuals(ratio, row, 3).tolist() == [7, 6, 4, 24, 16]


def test_the_loss_over_all_actions_is_computed_as_by_hand():
    log_pi, log_p = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    # weights (0.375, 0.625); residuals log(1/2), log(3/2)
    expected = 0.375 * 0.6931472**2 / 2 + 0.625 * 0.4054651**2 / 2
    assert all_actions_loss(log_pi, log_p, clip=10.0).item() == pytest.approx(expected, abs=1e-6)
    clipped = 0.375 * 0.5 * (0.6931472 - 0.25) + 0.625 * 0.4054651**2 / 2
    assert all_actions_loss(log_pi, log_p, clip=0.5).item() == pytest.approx(clipped, abs=1e-6)


def test_the_ends_of_the_generalised_jsd_are_the_two_kls():
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    forward = 0.25 * torch.tensor(0.5).log() + 0.75 * torch.tensor(1.5).log()
    reverse = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()
    assert generalised_jsd(student, teacher, 0.0).item() == pytest.approx(forward.item(), abs=1e-6)
    assert generalised_jsd(student, teacher, 1.0).item() == pytest.approx(reverse.item(), abs=1e-6)
    # m = (0.375, 0.625)
    middle = 0.5 * (0.25 * torch.tensor(2 / 3).log() + 0.75 * torch.tensor(1.2).log())
    middle += 0.5 * (0.5 * torch.tensor(4 / 3).log() + 0.5 * torch.tensor(0.8).log())
    assert generalised_jsd(student, teacher, 0.5).item() == pytest.approx(middle.item(), abs=1e-6)


def test_the_forward_kl_is_computed_as_by_hand():
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    expected = 0.25 * torch.tensor(0.5).log() + 0.75 * torch.tensor(1.5).log()
    assert forward_kl(student, teacher).item() == pytest.approx(expected.item(), abs=1e-6)


def test_a_method_without_its_teacher_is_refused():
    with pytest.raises(ValueError, match="needs a teacher"):
        KD(KDConfig(type="kd"), 300, None)


@pytest.mark.parametrize(("share", "own"), [(0.0, {0}), (0.25, {2}), (0.3, {2, 3}), (1.0, {8})])
def test_path_consistency_sees_own_completions_and_references_in_one_batch(share, own):
    """An own completion is the one token 9. A share of .3 of 8 rows is 2.4, so two or three rows."""
    batch = Batch.of([[5 + row] for row in range(8)], [[3, 4]] * 8, pad=0)

    def sampler(model, rows, visible, end, *, longest):
        return Batch.of(rows.prompts(), [[9]] * len(rows.ids), end)

    method = PCL(PCLConfig(type="pcl", on_policy=share), 10, object())
    method.sampler = sampler
    seen = torch.zeros(8)
    for _ in range(40):
        prepared = method.prepare(None, batch)
        assert prepared.prompts() == batch.prompts()
        answers = prepared.answers
        assert answers.count([9]) in own
        assert answers.count([9]) + answers.count([3, 4]) == 8
        seen += torch.tensor([answer == [9] for answer in answers])
    assert seen.min() > 0 or share == 0
