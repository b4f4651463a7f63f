"""Our Muon, compared with torch's own."""

import pytest
import torch

from training.loop import muon
from training.loop.muon import Muon

torch.set_num_threads(1)  # tiny models: threads only wait for each other


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
def test_our_muon_makes_the_steps_of_torchs_with_and_without_bfloat16(monkeypatch, shape, bf16):
    monkeypatch.setattr(muon, "fast_bf16", lambda device: bf16)
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs, start = torch.nn.Parameter(ours.detach().clone()), ours.detach().clone()
    own = Muon([ours], weight_decay=0.1)
    other = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    own.param_groups[0]["lr"] = 0.01
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        own.step()
        other.step()
    far = (ours - start).norm()
    assert (ours - theirs).norm() < 0.02 * far  # bfloat16 has three digits
    assert bf16 == torch.equal(ours, theirs)
