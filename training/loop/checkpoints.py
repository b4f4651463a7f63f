"""Checkpoints of a run: one file, the same whatever the number of processes."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer
from transformers import PreTrainedModel

from training import parallel

CHECKPOINT = "checkpoint.pt"
TRAINED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
RESTORED = StateDictOptions(full_state_dict=True, strict=False)  # frozen parameters are missing


class Restored(NamedTuple):
    """What a checkpoint holds besides weights and optimizers."""

    step: int
    """To go on from; 0 without a checkpoint."""
    best: dict[str, Any]
    """State of `training.loop.best.Best`; empty without one."""


def save(
    directory: Path,
    step: int,
    model: PreTrainedModel,
    optimizers: list[Optimizer],
    best: dict[str, Any] | None = None,
    record: dict[str, Any] | None = None,
) -> None:
    """Atomic: a kill leaves the old one or the new one. Frozen parameters are not in it.

    Args:
        directory: of the run.
        step: the last one that was done.
        model: its trained parameters are kept.
        optimizers: their states are kept.
        best: state of the best validation.
        record: what the recipe says of this stage, see `training.record`.
    """
    weights, states = get_state_dict(model, optimizers, options=TRAINED)
    if parallel.is_first():
        saved = {"step": step, "model": _trained(weights, model), "optimizers": states}
        _write(saved | {"best": best or {}, "record": record}, directory / CHECKPOINT)
    parallel.barrier()


def restore(directory: Path, model: PreTrainedModel, optimizers: list[Optimizer]) -> Restored:
    """Fill model and optimizers. The checkpoint may come from another number of processes."""
    if not (directory / CHECKPOINT).exists():
        return Restored(0, {})
    state = torch.load(directory / CHECKPOINT, weights_only=True, mmap=True)
    set_state_dict(
        model,
        optimizers,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizers"],
        options=RESTORED,
    )
    return Restored(state["step"], state.get("best") or {})


class Saved(NamedTuple):
    """What the next run must know before it goes on."""

    step: int
    record: dict[str, Any] | None
    """None: written before there were records."""


def saved(directory: Path) -> Saved | None:
    """Of a directory's checkpoint, without its weights; None without a checkpoint."""
    if not (directory / CHECKPOINT).exists():
        return None
    state = torch.load(directory / CHECKPOINT, weights_only=True, mmap=True)
    return Saved(state["step"], state.get("record"))


def save_weights(file: Path, model: PreTrainedModel) -> None:
    """Atomic; of the trained parameters alone."""
    weights = get_model_state_dict(model, options=TRAINED)
    if parallel.is_first():
        _write(_trained(weights, model), file)
    parallel.barrier()


def load_weights(file: Path, model: PreTrainedModel) -> None:
    """The trained parameters of `save_weights`."""
    weights = torch.load(file, weights_only=True, mmap=True)
    set_model_state_dict(model, weights, options=RESTORED)


def _trained(weights: Mapping[str, object], model: PreTrainedModel) -> dict[str, object]:
    """Without a frozen output matrix that is the embedding too and comes under its second name."""
    kept = dict(weights)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            kept.pop(name, None)
    return kept


def _write(state: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(file.name + ".tmp")
    torch.save(state, scratch)
    os.replace(scratch, file)
