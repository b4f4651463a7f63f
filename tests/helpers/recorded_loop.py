"""Completions of the closed loop, as a gateway records them."""

from typing import NamedTuple

import torch

from measuring.trajectories import Trajectory
from tests.helpers.tiny_models import VISIBLE
from training.gating.lessons import Trajectories, collect
from training.gating.rollout import FREE, ClosedLoop, Request, Rollout


class Recorded(NamedTuple):
    """20 completions, in the closed loop's form and as a gateway records them."""

    prompts: list[list[int]]
    seen: Trajectories
    """Positions of the completions."""
    completions: list[Rollout]
    served: list[Trajectory]
    """The same completions, as a gateway records them."""


def recorded(loop: ClosedLoop) -> Recorded:
    """Write 20 completions at a price of .7, without a bucket."""
    torch.manual_seed(0)
    prompts = [torch.randint(2, VISIBLE, (3 + i % 5,)).tolist() for i in range(20)]
    seen, completions = collect(loop, [Request(prompt, 0.7, FREE) for prompt in prompts])
    served = []
    for prompt, completion in zip(prompts, completions, strict=True):
        spans = [(start, start + 1) for start in completion.starts]
        served.append(Trajectory(prompt, completion.tokens, spans))
    return Recorded(prompts, seen, completions, served)
