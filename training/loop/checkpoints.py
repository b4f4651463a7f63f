"""Checkpoints of a run: one file, the same whatever the number of processes."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer
from transformers import PreTrainedModel

from training import parallel

CHECKPOINT = "checkpoint.pt"


def save(directory: Path, step: int, model: PreTrainedModel, optimizers: list[Optimizer]) -> None:
    """Atomic: a kill leaves the old one or the new one. Frozen parameters are not in it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights, states = get_state_dict(model, optimizers, options=options)
    if parallel.is_first():
        # A frozen output matrix that is the embedding too is still there, under its second name.
        frozen = {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
        weights = {name: tensor for name, tensor in weights.items() if name not in frozen}
        scratch = directory / (CHECKPOINT + ".tmp")
        torch.save({"step": step, "model": weights, "optimizers": states}, scratch)
        os.replace(scratch, directory / CHECKPOINT)
    parallel.barrier()


def restore(directory: Path, model: PreTrainedModel, optimizers: list[Optimizer]) -> int:
    """Step to go on from; 0 without a checkpoint. It may come from another number of processes."""
    if not (directory / CHECKPOINT).exists():
        return 0
    state = torch.load(directory / CHECKPOINT, weights_only=True, mmap=True)
    set_state_dict(
        model,
        optimizers,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizers"],
        options=StateDictOptions(full_state_dict=True, strict=False),  # frozen parameters are missing
    )
    return state["step"]


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All parameters and buffers, whole and on the CPU; empty in all processes but the first."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
