"""On-policy batches: a model's own completions of a batch's prompts."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from training.batches import Batch, left_padded
from training.rollout import Stepper


@torch.no_grad()
def sampled(model: PreTrainedModel, batch: Batch, visible: int, end: int, temperature: float = 1.0) -> Batch:
    """The batch's prompts with completions drawn from `model`, at top_p = 1; no longer than the batch is
    wide.

    visible: only ids below it are drawn. end: the end-of-sequence id, also used to pad.
    """
    lengths = batch.answer.int().argmax(1) + 1
    prompts = [row[:n].tolist() for row, n in zip(batch.ids, lengths.tolist(), strict=True)]
    ids, mask = left_padded(prompts, end)
    stepper, written = Stepper(model), []
    alive = torch.ones(len(prompts), dtype=torch.bool)
    for _ in range(int(batch.answer.sum(1).max()) + 1):
        _, logits = stepper.step(ids, mask)
        token = (logits[:, :visible] / temperature).softmax(-1).multinomial(1)
        token[~alive] = end
        written.append(token)
        alive &= token.squeeze(1) != end
        if not alive.any():
            break
        ids, mask = token, torch.cat((mask, torch.ones_like(token)), dim=1)
    answers = [until_end(row, end) for row in torch.cat(written, dim=1).tolist()]
    return Batch.of(prompts, answers, end)


def until_end(tokens: list[int], end: int) -> list[int]:
    """Up to and with the first end token; all where there is none."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens
