"""Baselines that are no gates: whole requests to the teacher, by what the student's own answer looks like."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from training.gating.rollout import Rollout
from training.gating.tree import Tree


def query_level(
    alone: Sequence[Rollout], taught: Sequence[Rollout], worth: Tensor, shares: Iterable[float]
) -> list[list[Rollout]]:
    """For each share of the requests the completions where those of most worth go to the teacher.

    alone, taught: by the student alone and by the teacher alone. worth: (requests,)
    """
    order = worth.argsort(descending=True).tolist()
    mixed = []
    for share in shares:
        chosen = set(order[: round(share * len(order))])
        mixed.append([(taught if i in chosen else alone)[i] for i in range(len(order))])
    return mixed


def hesitation(tree: Tree, alone: Sequence[Rollout]) -> Tensor:
    """Mean entropy of the student's own completions, nats: (requests,). A router of whole requests that looks
    at prompts only knows less.
    """
    scores = tree.scores("entropy")
    return torch.stack([scores[tree.path(i, c.tokens)].mean() for i, c in enumerate(alone)])
