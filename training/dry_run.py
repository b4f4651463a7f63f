"""`wheels train --dry-run`: what a recipe would train, in how much memory, for how long; nothing is kept."""

import resource
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from training import parallel
from training.batches import Batch
from training.config import ROLES, Recipe, ServedConfig
from training.loop.progress import console
from training.loop.trainer import make_optimizers, update
from training.models import build, parameters, reserved_rows, save_model
from training.pipeline import Job, check, ensure_tokenizer, job, make_model, task_of
from training.tokenizer import visible_ids
from training.workspace import Workspace

STEPS = 9
"""Measured; the first ones compile and warm up, so that the median counts."""


def dry_run(recipe: Recipe, stages: tuple[str, ...]) -> None:
    """A few steps of each model to train; an untrained teacher stands in for a missing one.

    Raises what `training.pipeline.run` would at its start.
    """
    torch.set_num_threads(recipe.threads)
    task = task_of(recipe)
    with parallel.processes(), TemporaryDirectory() as scratch:
        space = Workspace(recipe.model_copy(update={"work": Path(scratch) / "work"}))
        check(recipe, stages)
        Workspace(recipe).check(stages)
        tokenizer = ensure_tokenizer(space, task)
        local = not isinstance(recipe.teacher, ServedConfig)
        if local and "student" in stages and not space.is_exported("teacher"):
            space = Workspace(space.recipe.model_copy(update={"output": Path(scratch) / "output"}))
            if recipe.teacher.schedule is None:
                make_model(space, "teacher", task, tokenizer)
            else:
                untrained = build(recipe.teacher, tokenizer, recipe.seed)
                save_model(untrained, tokenizer, space.exported("teacher"))
        for role in ROLES:
            if role in stages and recipe.model(role).schedule is not None:
                report(role, job(space, role, task, tokenizer), tokenizer, recipe.seed)


def report(role: str, this: Job, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    model, schedule = this.model, this.config.schedule
    optimizers = make_optimizers(model, schedule)
    seconds, tokens = [], []
    for step in range(STEPS):
        batch, began = this.batches[step], time.monotonic()
        done = update(model, this.method.loss, this.method.prepare, optimizers, batch, step, schedule, seed)
        seconds.append(time.monotonic() - began)
        tokens.append(done.positions)
    trained = [p for p in model.parameters() if p.requires_grad]
    states = [x for o in optimizers for state in o.state.values() for x in state.values()]
    usual = median(seconds)
    total = timedelta(seconds=round(sum(seconds) + usual * (schedule.steps - STEPS)))
    reserved, ids = reserved_rows(model, tokenizer), visible_ids(tokenizer)
    rows = {
        "parameters": f"{parameters(model):,}, trained {parameters(model, trained_only=True):,}",
        "vocabulary": f"{ids:,} ids, reserved rows {reserved.start:,} to {reserved.end - 1:,}",
        "batch": shape_of(batch, schedule.accumulate),
        "memory of a process": f"weights {size(model.parameters())}, gradients {size(trained)}, "
        f"optimizer {size(states)}, peak {peak()}",
        "a step": f"{usual:.3g} s (the first {seconds[0]:.1f} s), "
        f"{median(tokens) / usual:,.0f} trained tokens/s",
        "in all": f"{total} for {schedule.steps:,} steps; validation not counted",
    }
    if parallel.is_first():
        title = f"{role}: {this.config.method.type} on {parallel.size()} × {parallel.device().type}"
        table = Table(title=title, show_header=False)
        for name, value in rows.items():
            table.add_row(name, value)
        console.print(table)


def shape_of(batch: Batch, accumulate: int) -> str:
    rows, width = batch.ids.shape
    parts = f", as {parallel.size()} × {accumulate} parts" if parallel.size() * accumulate > 1 else ""
    return f"{rows} × {width} ids, {batch.positions:,} of them trained (the last one measured){parts}"


def size(tensors: Iterable[object]) -> str:
    """Of what lies in this process."""
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors if isinstance(t, Tensor)]
    return megabytes(sum(t.numel() * t.element_size() for t in local))


def peak() -> str:
    """Of the GPU's memory, or of the whole process where there is none."""
    if torch.cuda.is_available():
        return megabytes(torch.cuda.max_memory_allocated())
    return megabytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) + " (whole process)"


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"
