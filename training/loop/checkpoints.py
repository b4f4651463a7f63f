"""Checkpoints of a run: one file, which does not depend on the number of processes."""

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
    """The values of a checkpoint other than weights and optimizer states."""

    step: int
    """Number of steps that are done; 0 without a checkpoint."""
    best: dict[str, Any]
    """State of `training.loop.best.Best`; empty without a checkpoint."""


def save(
    directory: Path,
    step: int,
    model: PreTrainedModel,
    optimizers: list[Optimizer],
    best: dict[str, Any] | None = None,
    record: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint, without frozen parameters. A kill leaves the old checkpoint or the new one.

    Args:
        directory: directory of the run.
        step: number of steps that are done.
        model: the model, whose trained parameters are kept.
        optimizers: the optimizers, whose states are kept.
        best: state of the best validation.
        record: the record of this stage, see `training.record`.
    """
    weights, states = get_state_dict(model, optimizers, options=TRAINED)
    if parallel.is_first():
        saved = {"step": step, "model": _trained(weights, model), "optimizers": states}
        _write(saved | {"best": best or {}, "record": record}, directory / CHECKPOINT)
    parallel.barrier()


def restore(directory: Path, model: PreTrainedModel, optimizers: list[Optimizer]) -> Restored:
    """Load a run's checkpoint into model and optimizers. Another number of processes may have written it."""
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
    """Step and record of a checkpoint, to check before a run resumes."""

    step: int
    """Number of steps that are done."""
    record: dict[str, Any] | None
    """Record of the stage; None if an earlier version wrote the checkpoint without a record."""


def saved(directory: Path) -> Saved | None:
    """Step and record of a directory's checkpoint, without loading its weights; None without a checkpoint."""
    if not (directory / CHECKPOINT).exists():
        return None
    state = torch.load(directory / CHECKPOINT, weights_only=True, mmap=True)
    return Saved(state["step"], state.get("record"))


def save_weights(file: Path, model: PreTrainedModel) -> None:
    """Write the trained parameters to a file, atomically; all processes take part."""
    weights = get_model_state_dict(model, options=TRAINED)
    if parallel.is_first():
        _write(_trained(weights, model), file)
    parallel.barrier()


def load_weights(file: Path, model: PreTrainedModel) -> None:
    """Load a model's trained parameters from a file that `save_weights` has written."""
    weights = torch.load(file, weights_only=True, mmap=True)
    set_model_state_dict(model, weights, options=RESTORED)


def _trained(weights: Mapping[str, object], model: PreTrainedModel) -> dict[str, object]:
    """The weights without frozen parameters, also under the second name of a matrix that serves twice."""
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
