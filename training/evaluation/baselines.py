"""Baselines that are not gates: they send whole requests to the teacher, chosen by the student's answer."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from training.gating.rollout import Rollout
from training.gating.tree import Tree


def query_level(
    alone: Sequence[Rollout], taught: Sequence[Rollout], worth: Tensor, shares: Iterable[float]
) -> list[list[Rollout]]:
    """The completions for each share of requests to send to the teacher, those of largest worth first.

    Args:
        alone: the completions by the student alone.
        taught: the completions by the teacher alone.
        worth: (requests,), worth of sending each request to the teacher.
        shares: shares of the requests to send.
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
    """(requests,) mean entropy of the student over its own completions, in nats.

    A real query-level router knows less, because it sees only the prompts.
    """
    scores = tree.scores("entropy")
    means = []
    for number, completion in enumerate(alone):
        means.append(scores[tree.path(number, completion.tokens)].mean())
    return torch.stack(means)
