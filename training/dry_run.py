"""`wheels train --dry-run`: what a recipe would train, in how much memory, for how long; nothing is kept."""

import resource
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from training import parallel
from training.batches import Batch
from training.config import ROLES, Recipe, ServedConfig
from training.loop.progress import console
from training.loop.trainer import make_optimizers, update
from training.models import build, parameters, reserved_rows, save_model, trained
from training.pipeline import Job, check, check_references, ensure_tokenizer, make_job, make_model, task_of
from training.tokenizer import visible_ids
from training.workspace import Stage, Workspace

STEPS = 9
"""Measured; the first ones compile and warm up, so that the median counts."""


def dry_run(recipe: Recipe, stages: tuple[Stage, ...]) -> None:
    """A few steps of each model to train; an untrained teacher stands in for a missing one.

    Raises what `training.pipeline.run` would at its start.
    """
    torch.set_num_threads(recipe.threads)
    task = task_of(recipe)
    with parallel.processes(), TemporaryDirectory() as scratch:
        space = Workspace(recipe.model_copy(update={"work": Path(scratch) / "work"}))
        check(recipe, stages)
        check_references(recipe, task, stages)
        Workspace(recipe).check(stages)
        tokenizer = ensure_tokenizer(space, task)
        missing = "student" in stages and not space.is_exported("teacher")
        if missing and not isinstance(recipe.teacher, ServedConfig):
            space = Workspace(space.recipe.model_copy(update={"output": Path(scratch) / "output"}))
            if recipe.teacher.plan is None:
                make_model(space, "teacher", task, tokenizer)
            else:
                untrained = build(recipe.teacher, tokenizer, recipe.seed, space.exported("teacher"))
                save_model(untrained, tokenizer, space.exported("teacher"))
        for role in ROLES:
            plan = recipe.model(role).plan
            if role in stages and plan is not None:
                title = f"{role}: {plan.method.type} on {parallel.size()} × {parallel.device().type}"
                report(title, make_job(space, role, task, tokenizer), tokenizer, recipe.seed)


class Trial(NamedTuple):
    """The steps that were run."""

    seconds: list[float]
    """Of each step."""
    tokens: list[int]
    """Trained tokens of each step."""
    batch: Batch
    """The last one."""
    optimizers: list[Optimizer]
    """After the last step."""


def tried(job: Job, seed: int) -> Trial:
    """Run the first steps."""
    optimizers = make_optimizers(job.model, job.schedule)
    seconds = []
    tokens = []
    for step in range(STEPS):
        batch = job.batches[step]
        began = time.monotonic()
        done = update(
            job.model, job.method.loss, job.method.prepare, optimizers, batch, step, job.schedule, seed
        )
        seconds.append(time.monotonic() - began)
        tokens.append(done.positions)
    return Trial(seconds, tokens, batch, optimizers)


def report(title: str, job: Job, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Run the first steps of a job, and print a table of what they took."""
    run = tried(job, seed)
    model = job.model
    schedule = job.schedule
    states: list[object] = []
    for optimizer in run.optimizers:
        for state in optimizer.state.values():
            states += state.values()
    usual = median(run.seconds)
    total = timedelta(seconds=round(sum(run.seconds) + usual * (schedule.steps - STEPS)))
    reserved = reserved_rows(model, tokenizer)
    ids = visible_ids(tokenizer)
    rows = {
        "parameters": f"{parameters(model):,}, trained {parameters(model, trained_only=True):,}",
        "vocabulary": f"{ids:,} ids, reserved rows {reserved.start:,} to {reserved.end - 1:,}",
        "batch": shape_of(run.batch, schedule.accumulate),
        "memory of a process": f"weights {size(model.parameters())}, gradients {size(trained(model))}, "
        f"optimizer {size(states)}, peak {peak()}",
        "a step": f"{usual:.3g} s (the first {run.seconds[0]:.1f} s), "
        f"{median(run.tokens) / usual:,.0f} trained tokens/s",
        "in all": f"{total} for {schedule.steps:,} steps; validation not counted",
    }
    if parallel.is_first():
        table = Table(title=title, show_header=False)
        for name, value in rows.items():
            table.add_row(name, value)
        console.print(table)


def shape_of(batch: Batch, accumulate: int) -> str:
    """Rows and width of a batch, and how it is split."""
    rows, width = batch.ids.shape
    parts = f", as {parallel.size()} × {accumulate} parts" if parallel.size() * accumulate > 1 else ""
    return f"{rows} × {width} ids, {batch.positions:,} of them trained (the last one measured){parts}"


def size(tensors: Iterable[object]) -> str:
    """Of what lies in this process."""
    total = 0
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()
        if isinstance(tensor, Tensor):
            total += tensor.numel() * tensor.element_size()
    return megabytes(total)


def peak() -> str:
    """Of the GPU's memory, or of the whole process where there is none."""
    if torch.cuda.is_available():
        return megabytes(torch.cuda.max_memory_allocated())
    return megabytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) + " (whole process)"


def megabytes(count: float) -> str:
    """Bytes, to read."""
    return f"{count / 1e6:,.1f} MB"
