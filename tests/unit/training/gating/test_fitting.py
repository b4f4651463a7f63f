"""Epochs of AdamW with one cycle of the learning rate."""

import pytest
import torch
from torch import nn

from training.gate_config import GateConfig, RegretGain
from training.gating.fitting import descend


@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (2, 1), (1, 9), (1, 10), (5, 2), (10, 1), (1, 11)])
def test_a_fit_may_have_any_number_of_steps(epochs, steps):
    config = GateConfig(span_tokens=1, ask_tokens=1, gain=RegretGain(type="regret"), epochs=epochs)
    number = nn.Parameter(torch.tensor(1.0))
    last = descend([number], steps, lambda: range(steps), lambda _part: number**2, config)
    assert last <= 1
    assert number <= 1
