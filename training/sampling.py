"""Completions by one model: on-policy batches, and greedy answers for validation."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from training import parallel
from training.batches import Batch, left_padded
from training.reading import Stepper, context_of

MAX_TOKENS = 64


def sampled(
    model: PreTrainedModel,
    batch: Batch,
    visible: int,
    end: int,
    temperature: float = 1.0,
    longest: int = MAX_TOKENS,
) -> Batch:
    """The batch's prompts with completions drawn from `model`, at top_p = 1.

    Args:
        model: writes the completions.
        batch: its answers are not looked at.
        visible: only ids below it are drawn.
        end: the end-of-sequence id, also used to pad.
        temperature: 0 is greedy.
        longest: tokens of a completion, the end token with them; fewer where the model's context ends.
    """
    prompts = batch.prompts()
    answers = complete(model, prompts, visible, end, longest, temperature)
    return Batch.of(prompts, answers, end).to(batch.ids.device)


def room(model: PreTrainedModel, prompts: list[list[int]], longest: int) -> int:
    """Tokens that fit after the longest prompt of all processes, at least 1 and at most `longest`."""
    free = context_of(model) - max(map(len, prompts))
    return int(parallel.smallest(max(1, min(longest, free))))


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without any dropout; afterwards the model trains on if it did before."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


@torch.no_grad()
def complete(
    model: PreTrainedModel, prompts: list[list[int]], visible: int, end: int, longest: int, temperature: float
) -> list[list[int]]:
    """Answers of at most `longest` tokens, the end token with them; temperature 0 is greedy.

    Where the model is sharded, all processes call this together, each with as many prompts.
    """
    ids, mask = left_padded(prompts, end, model.device)
    stepper = Stepper(model)
    written: list[torch.Tensor] = []
    alive = torch.ones(len(prompts), dtype=torch.bool, device=model.device)
    # A tenth faster than no_grad in small steps; but gathered parameters are trained later.
    lean = torch.inference_mode(parallel.size() == 1)
    # A compiled decoder is for batches of one length; a growing cache would compile it again and again.
    with lean, evaluating(model), parallel.whole(model), torch.compiler.set_stance("force_eager"):
        for _ in range(room(model, prompts, longest)):
            logits = stepper.step(ids, mask).logits[:, :visible].float()
            token = drawn((logits / temperature).softmax(-1)) if temperature else logits.argmax(-1)
            token = torch.where(alive, token, end)
            written.append(token)
            alive &= token != end
            if not parallel.any_of(bool(alive.any())):
                break
            ids = token[:, None]
            mask = torch.cat((mask, torch.ones_like(ids)), dim=1)
    return [until_end(row, end) for row in torch.stack(written, dim=1).tolist()]


def drawn(probabilities: torch.Tensor) -> torch.Tensor:
    """One id of each row of (B, V), by inversion: (B,).

    The uniform numbers are drawn on the CPU for the rows of all processes, of which each takes its own. So
    they differ between processes that share a seed, and do not depend on how rows are spread over processes
    and devices.
    """
    rows = len(probabilities)
    uniform = torch.rand(parallel.size(), rows)[parallel.rank()].to(probabilities.device)
    cumulative = probabilities.cumsum(-1)
    ids = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True).squeeze(1)
    return ids.clamp(max=probabilities.shape[1] - 1)


def until_end(tokens: list[int], end: int) -> list[int]:
    """Up to and with the first end token; all where there is none."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens
