"""Completions written by one model: on-policy batches, and greedy answers for validation."""

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
        model: the model that writes the completions.
        batch: the batch with the prompts; its answers are ignored.
        visible: only ids below this are drawn.
        end: the end-of-sequence id, also used to pad.
        temperature: temperature of sampling; 0 is greedy.
        longest: most tokens in a completion, including the end token; fewer if the model's context is full.
    """
    prompts = batch.prompts()
    answers = complete(model, prompts, visible, end, longest, temperature)
    return Batch.of(prompts, answers, end).to(batch.ids.device)


def room(model: PreTrainedModel, prompts: list[list[int]], longest: int) -> int:
    """Number of tokens that fit after the longest prompt of all processes: 1 to `longest`."""
    free = context_of(model) - max(map(len, prompts))
    return int(parallel.smallest(max(1, min(longest, free))))


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put the model into evaluation mode (no dropout) inside the block, and restore its mode afterwards."""
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
    """Completions of the prompts, as token ids that include the end token.

    If the model is sharded, all processes must call this together, each with the same number of prompts.

    Args:
        model: the model that writes.
        prompts: the token ids of each prompt.
        visible: only ids below this are written.
        end: the end-of-sequence id, also used to pad.
        longest: most tokens in a completion, including the end token; fewer if the model's context is full.
        temperature: temperature of sampling; 0 is greedy.
    """
    ids, mask = left_padded(prompts, end, model.device)
    stepper = Stepper(model)
    written: list[torch.Tensor] = []
    alive = torch.ones(len(prompts), dtype=torch.bool, device=model.device)
    # inference_mode is a tenth faster than no_grad in small steps, but a sharded model's gathered
    # parameters are trained later, which inference tensors cannot be.
    lean = torch.inference_mode(parallel.size() == 1)
    # The decoder is compiled for batches of one length: a growing cache would compile it again and again.
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
    """Ids (B,), one drawn from each row of probabilities (B, V), by inversion of the cumulative sum.

    Uniform numbers are drawn on the CPU for the rows of all processes, and each process uses those of its own
    rows. So the numbers differ between processes that share a seed, and they do not depend on how rows are
    spread over processes and devices.
    """
    rows = len(probabilities)
    uniform = torch.rand(parallel.size(), rows)[parallel.rank()].to(probabilities.device)
    cumulative = probabilities.cumsum(-1)
    ids = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True).squeeze(1)
    return ids.clamp(max=probabilities.shape[1] - 1)


def until_end(tokens: list[int], end: int) -> list[int]:
    """The tokens up to and including the first end token; all tokens if there is none."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens
