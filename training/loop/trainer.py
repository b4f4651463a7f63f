"""The training loop: batch, step, log, checkpoint; a killed run resumes and repeats itself exactly.

A step's batch is split into equal parts over the processes (`training.parallel`) and over
`schedule.accumulate` passes; the loss of each counts by its share of the positions, so that however it is
split, the gradient is the whole batch's.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from training import parallel
from training.batches import Batch
from training.config import Schedule
from training.loop.checkpoints import restore, save
from training.loop.muon import Muon
from training.loop.progress import Log, Progress, console
from training.loop.stopping import Stopped, stop_requests

Loss = Callable[[PreTrainedModel, Batch], tuple[Tensor, dict[str, Tensor]]]
"""A scalar, the mean over the positions of the batch's answers, and scalars to log."""
Prepare = Callable[[PreTrainedModel, Batch], Batch]
"""What the loss is taken of, e.g. the model's own completions; called without gradient."""
Validate = Callable[[PreTrainedModel], dict[str, float]]


class Batches(Protocol):
    """Batch number `step`, the same in every process."""

    def __getitem__(self, step: int) -> Batch: ...


def unchanged(model: PreTrainedModel, batch: Batch) -> Batch:
    return batch


def train(
    model: PreTrainedModel, loss: Loss, batches: Batches, schedule: Schedule, directory: Path, *,
    prepare: Prepare = unchanged, validate: Validate | None = None, seed: int = 0,
) -> None:  # fmt: skip
    """Train `model` in place for `schedule.steps`, from `directory`'s checkpoint where there is one.

    Raises Stopped, after writing a checkpoint, on SIGTERM or SIGINT; ValueError where `schedule.batch` does
    not split over processes and `schedule.accumulate`; FloatingPointError where a metric is not finite.
    """
    optimizers = make_optimizers(model, schedule)
    start = restore(directory, model, optimizers)
    if schedule.precision == "bf16" and parallel.is_first() and not parallel.fast_bf16(parallel.device()):
        console.print(f"{directory.name}: this CPU has no instructions for bf16: fp32 instead")
    model.train()
    with (
        stop_requests() as stop,
        Log(directory, start) as log,
        Progress(directory.name, start, schedule.steps) as progress,
    ):
        tokens, since, began = 0, start, time.monotonic()
        for step in range(start, schedule.steps):
            metrics, count = update(model, loss, prepare, optimizers, batches[step], step, schedule, seed)
            done, last = step + 1, step + 1 == schedule.steps
            tokens += count
            progress.advance(count)
            if done % schedule.log_every == 0 or last:
                now = time.monotonic()
                speed = {"steps_per_second": (done - since) / (now - began),
                         "tokens_per_second": tokens / (now - began)}  # fmt: skip
                log.write(done, averaged(metrics) | speed)
                tokens, since, began = 0, done, now
            if validate and schedule.validate_every and (done % schedule.validate_every == 0 or last):
                model.eval()
                log.write(done, validate(model))
                model.train()
            stopping = parallel.any_of(stop.requested)
            if done % schedule.checkpoint_every == 0 or last or stopping:
                save(directory, done, model, optimizers)
            if stopping and not last:
                raise Stopped(f"{directory.name}: stopped after step {done} of {schedule.steps}")
    model.eval()


def update(
    model: PreTrainedModel, loss: Loss, prepare: Prepare, optimizers: list[Optimizer], batch: Batch,
    step: int, schedule: Schedule, seed: int,
) -> tuple[dict[str, Tensor], int]:  # fmt: skip
    """One optimizer step. Returns this process's metrics (their sum over the processes is the whole batch's,
    but for `grad_norm`, which is known to all) and the whole batch's number of trained positions.
    """
    torch.manual_seed(seed * 1_000_003 + step)  # a resumed run draws the same
    device = parallel.device()
    bf16 = schedule.precision == "bf16" and parallel.fast_bf16(device)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    accumulate, size = schedule.accumulate, parallel.size()
    mine = batch.parts(accumulate * size)[parallel.rank() :: size]
    with torch.no_grad(), amp:
        parts = [prepare(model, part.to(device)) for part in mine]
    positions = int(parallel.total(sum(part.positions for part in parts)))
    metrics: dict[str, Tensor] = defaultdict(float)
    for i, part in enumerate(parts):
        parallel.synchronise_gradients(model, i + 1 == accumulate)
        with amp:
            value, logged = loss(model, part)
        share = part.positions / positions
        (value * share * size).backward()  # the processes' gradients are averaged, not summed
        for name, metric in logged.items():
            metrics[name] += metric * share
    metrics["grad_norm"] = clip_grad_norm_(
        [p for p in model.parameters() if p.requires_grad], schedule.clip, foreach=True
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * learning_rate_factor(step, schedule)
        optimizer.step()
        optimizer.zero_grad()
    return metrics, positions


def averaged(metrics: dict[str, Tensor]) -> dict[str, float]:
    """The whole batch's metrics as numbers."""
    norm = metrics["grad_norm"]
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    others = {k: parallel.total(float(v)) for k, v in metrics.items() if k != "grad_norm"}
    return others | {"grad_norm": float(norm)}


def learning_rate_factor(step: int, schedule: Schedule) -> float:
    """Linear warm-up, constant, linear to zero."""
    left = (schedule.steps - step) / (schedule.steps * schedule.decay)
    return min(1.0, (step + 1) / max(1, schedule.warmup), left)


def make_optimizers(model: PreTrainedModel, schedule: Schedule) -> list[Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for all else."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inner = [p for name, p in trained if schedule.optimizer == "muon" and p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in inner}
    outer = [p for _, p in trained if id(p) not in chosen]
    optimizers: list[Optimizer] = []
    if outer:
        optimizers += [AdamW(outer, betas=(0.9, 0.98), weight_decay=schedule.weight_decay, fused=True)]
    if inner:
        optimizers += [Muon(inner, weight_decay=schedule.weight_decay)]
    return optimizers
