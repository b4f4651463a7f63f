"""`wheels train --dry-run`: estimates a recipe's parameters, memory and time, and keeps no result."""

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
from training.config import Recipe
from training.export import link_model
from training.gate_config import InProcessRollouts
from training.gating.router_stage import FrozenPair
from training.loop.progress import console
from training.loop.trainer import make_optimizers, update
from training.model_config import ROLES, Role, ServedConfig
from training.models import build, parameters, reserved_rows, save_model, trained
from training.pipeline import (
    Job,
    check,
    check_references,
    ensure_tokenizer,
    frozen_pair,
    make_job,
    make_model,
    task_of,
    traffic_stage,
)
from training.router_dry_run import RouterTrial, peak_memory, try_router
from training.served_dry_run import ServedTrial, try_served_router
from training.started_servers import with_addresses
from training.tasks import Task
from training.tokenizer import visible_ids
from training.workspace import Stage, Workspace

STEPS = 9
"""Number of measured steps. The first ones compile and warm up, so the median counts."""


def dry_run(recipe: Recipe, stages: tuple[Stage, ...]) -> None:
    """Train each model for a few steps, and a small router; untrained models stand in for missing ones.

    Raises the errors that `training.pipeline.run` would raise at its start.
    """
    torch.set_num_threads(recipe.threads)
    task = task_of(recipe)
    with parallel.processes(), TemporaryDirectory() as scratch:
        space = Workspace(recipe.model_copy(update={"work": Path(scratch) / "work"}))
        check(recipe, stages)
        check_references(recipe, task, stages)
        Workspace(recipe).check(stages)
        tokenizer = ensure_tokenizer(space, task)
        trained = all(space.is_exported(role) or recipe.model(role).is_ready for role in ROLES)
        space = with_stand_ins(space, stages, Path(scratch) / "output", task, tokenizer)
        for role in ROLES:
            plan = recipe.model(role).plan
            if role in stages and plan is not None:
                title = f"{role}: {plan.method.type} on {parallel.size()} × {parallel.device().type}"
                report(title, make_job(space, role, task, tokenizer), tokenizer, recipe.seed)
        if "router" in stages and parallel.is_first():
            try_and_report_router(space, task, tokenizer, trained)


def try_and_report_router(
    space: Workspace, task: Task, tokenizer: PreTrainedTokenizerBase, trained: bool
) -> None:
    """Run a small router stage, or pieces of one whose completions are served, and print a table."""
    if not isinstance(space.recipe.router.rollouts, InProcessRollouts):
        with with_addresses(space) as served:
            trial = try_served_router(traffic_stage(served, task, tokenizer))
        report_served_router(trial, started=served is not space)
        return
    pair = frozen_pair(space, tokenizer)
    report_router(try_router(space.recipe, pair, task, trained=trained), pair)


def with_stand_ins(
    space: Workspace, stages: tuple[Stage, ...], output: Path, task: Task, tokenizer: PreTrainedTokenizerBase
) -> Workspace:
    """The workspace itself, or one in `output` that has all models which later stages need.

    It links to exported models, and has untrained ones in place of those that are missing.
    """
    needed: list[Role] = []
    if {"student", "router"} & set(stages) and not isinstance(space.recipe.teacher, ServedConfig):
        needed.append("teacher")
    if "router" in stages:
        needed.append("student")
    if all(map(space.is_exported, needed)):
        return space
    stand_in = Workspace(space.recipe.model_copy(update={"output": output}))
    for role in needed:
        config = space.recipe.model(role)
        directory = stand_in.exported(role)
        if space.is_exported(role):
            link_model(str(space.exported(role)), directory)
        elif config.plan is None:
            make_model(stand_in, role, task, tokenizer)
        elif not isinstance(config, ServedConfig):
            untrained = build(config, tokenizer, space.recipe.seed, stand_in.exported("teacher"))
            save_model(untrained, tokenizer, directory)
    return stand_in


class Trial(NamedTuple):
    """The measured steps of one model."""

    seconds: list[float]
    """Seconds of each step."""
    tokens: list[int]
    """Number of trained tokens in each step."""
    batch: Batch
    """Batch of the last step."""
    optimizers: list[Optimizer]
    """Optimizers after the last step."""


def tried(job: Job, seed: int) -> Trial:
    """Run the first steps of a job, and measure them."""
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
    """Run the first steps of a job, and print a table of their time and memory."""
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
        "one step": f"{usual:.3g} s (the first {run.seconds[0]:.1f} s), "
        f"{median(run.tokens) / usual:,.0f} trained tokens/s",
        "total": f"{total} for {schedule.steps:,} steps; validation not counted",
    }
    if parallel.is_first():
        table = Table(title=title, show_header=False)
        for name, value in rows.items():
            table.add_row(name, value)
        console.print(table)


def report_router(run: RouterTrial, pair: FrozenPair) -> None:
    """Print a table of the time and memory of the router's stage."""
    beyond = "not known on this system" if run.memory is None else megabytes(run.memory)
    rows = {
        "completions": f"{run.rows:,} at once, of at most {pair.max_tokens} tokens",
        "memory": f"models {megabytes(run.weights)}, completions {beyond}, "
        f"states of at most {run.positions:,} positions {megabytes(run.states)}",
        "kept": f"prompts that were read, {megabytes(run.kept)} during the calibration",
    }
    if run.calibration is None:
        rows["rollouts"] = f"at most {seconds(run.rollouts)}, with the fit of the gate"
        rows["calibration"] = "unknown until both models are trained; then repeat with --stage router"
    else:
        rows["rollouts"] = f"{seconds(run.rollouts)}, with the fit of the gate"
        rows["calibration"] = f"{seconds(run.calibration)}"
        rows["total"] = f"{seconds(run.rollouts + run.calibration)}"
    table = Table(title=f"router: on {parallel.device().type}", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def report_served_router(run: ServedTrial, *, started: bool) -> None:
    """Print a table of the time and memory of the router's stage from served completions.

    Args:
        run: the measured pieces.
        started: whether the stage starts the servers.
    """
    work = run.work
    beyond = "not known on this system" if run.memory is None else megabytes(run.memory)
    forks = f", and {work.forks:,} that are begun" if work.forks else ""
    rows = {
        "completions": f"{work.completions:,} in {work.rounds} rounds, at most {work.tokens:,} tokens; "
        f"at most {work.asked:,} more for the prices{forks}",
        "memory": f"models {megabytes(run.weights)}, completions that are read {beyond}, "
        f"states of {run.positions:,} positions {megabytes(run.states)}",
        "reading": f"at most {seconds(run.reading)}",
        "fits": f"at most {seconds(run.fits)}",
    }
    if started:
        rows["servers"] = "started by the stage on this machine, as they were for this table"
    if work.is_asked_for and run.completion is None:
        rows["gateway"] = "does not answer yet: the time of its completions is known when it does"
    elif run.completion is not None:
        rows["gateway"] = (
            f"rounds {seconds(work.completions * run.completion)}, "
            f"prices at most {seconds(work.asked * run.completion)}"
        )
        if work.forks:  # on average, half of a completion is left to write
            rows["gateway"] += f", begun completions at most {seconds(work.forks * run.completion / 2)}"
    table = Table(title=f"router: on {parallel.device().type}, from served completions", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def seconds(value: float) -> timedelta:
    """A time in seconds, rounded for people to read."""
    return timedelta(seconds=round(value))


def shape_of(batch: Batch, accumulate: int) -> str:
    """Rows and width of a batch, and how it is split."""
    rows, width = batch.ids.shape
    parts = f", as {parallel.size()} × {accumulate} parts" if parallel.size() * accumulate > 1 else ""
    return f"{rows} × {width} ids, {batch.positions:,} of them trained (the last one measured){parts}"


def size(tensors: Iterable[object]) -> str:
    """Size of the tensors in this process, e.g. `1.5 MB`; of a sharded tensor, its local part counts."""
    total = 0
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()
        if isinstance(tensor, Tensor):
            total += tensor.numel() * tensor.element_size()
    return megabytes(total)


def peak() -> str:
    """Peak memory of the GPU, or of the whole process if there is no GPU, for people to read."""
    whose = "" if torch.cuda.is_available() else " (whole process)"
    return megabytes(peak_memory()) + whose


def megabytes(count: float) -> str:
    """A number of bytes in megabytes, for people to read."""
    return f"{count / 1e6:,.1f} MB"
