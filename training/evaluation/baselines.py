"""Baselines that are not gates: whole requests to the teacher, chosen by the student's own answer."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from training.gating.rollout import Rollout
from training.gating.tree import Tree


def query_level(
    alone: Sequence[Rollout], taught: Sequence[Rollout], worth: Tensor, shares: Iterable[float]
) -> list[list[Rollout]]:
    """For each share of the requests the completions if those of most worth go to the teacher.

    Args:
        alone: by the student alone.
        taught: by the teacher alone.
        worth: (requests,) of asking.
        shares: of the requests.
    """
    order = worth.argsort(descending=True).tolist()
    mixed = []
    for share in shares:
        completions = list(alone)
        for number in order[: round(share * len(order))]:
            completions[number] = taught[number]
        mixed.append(completions)
    return mixed


def hesitation(tree: Tree, alone: Sequence[Rollout]) -> Tensor:
    """Mean entropy of the student's own completions, nats: (requests,).

    A router of whole requests that looks at prompts only knows less.
    """
    scores = tree.scores("entropy")
    means = []
    for number, completion in enumerate(alone):
        means.append(scores[tree.path(number, completion.tokens)].mean())
    return torch.stack(means)
