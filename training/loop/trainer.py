"""The training loop: batch, step, log, checkpoint; a killed run resumes and repeats itself exactly.

A step's batch is split into equal parts over the processes (`training.parallel`), prepared, and split over
`schedule.accumulate` passes; the loss of each counts by its share of the positions, so that however it is
split, the gradient is the whole batch's.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from training import parallel
from training.batches import Batch
from training.config import Schedule
from training.loop.best import Best
from training.loop.checkpoints import restore, save
from training.loop.muon import Muon
from training.loop.progress import Log, Progress, console
from training.loop.stopping import Diverged, Stopped, stop_requests
from training.sampling import evaluating

Loss = Callable[[PreTrainedModel, Batch], tuple[Tensor, dict[str, Tensor]]]
"""A scalar, the mean over the positions of the batch's answers, and scalars to log."""
Prepare = Callable[[PreTrainedModel, Batch], Batch]
"""What the loss is taken of, e.g. the model's own completions; called without gradient."""
Validate = Callable[[PreTrainedModel], dict[str, float]]


Record = dict[str, Any]


class Batches(Protocol):
    """Batch number `step`, the same in every process."""

    def __getitem__(self, step: int) -> Batch: ...


def unchanged(model: PreTrainedModel, batch: Batch) -> Batch:
    """Prepares nothing: the loss is of the batch itself."""
    return batch


def train(
    model: PreTrainedModel,
    loss: Loss,
    batches: Batches,
    schedule: Schedule,
    directory: Path,
    *,
    prepare: Prepare = unchanged,
    validate: Validate | None = None,
    seed: int = 0,
    record: Record | None = None,
    trackers: Sequence[str] = ("tensorboard",),
) -> None:
    """Train `model` in place for `schedule.steps`, from `directory`'s checkpoint where there is one.

    Args:
        record: what the recipe says of this stage, kept in the checkpoint.
        trackers: names in `training.loop.trackers.TRACKERS`.

    Raises:
        Stopped: on SIGTERM or SIGINT, after writing a checkpoint.
        Diverged: a loss, a gradient or a metric is not finite; the last checkpoint stays as it is.
    """
    optimizers = make_optimizers(model, schedule)
    start, state = restore(directory, model, optimizers)
    best = Best(directory, schedule, state)
    announce(schedule, directory.name)
    model.train()
    with (
        named_failures(directory.name),
        stop_requests() as stop,
        Log(directory, start, trackers) as log,
        Progress(directory.name, start, schedule.steps) as progress,
    ):
        speed = Speed(start)
        for step in range(start, schedule.steps):
            if best.exhausted:
                break
            metrics, count = update(model, loss, prepare, optimizers, batches[step], step, schedule, seed)
            done, last = step + 1, step + 1 == schedule.steps
            speed.count(count)
            progress.advance(count)
            if done % schedule.log_every == 0 or last:
                log.write(done, averaged(metrics) | speed.since_last(done))
            if validate and schedule.validate_every and (done % schedule.validate_every == 0 or last):
                with evaluating(model):
                    scores = validate(model)
                log.write(done, scores)
                best.note(done, scores, model)
            stopping = parallel.any_of(stop.requested)
            if done % schedule.checkpoint_every == 0 or last or stopping or best.exhausted:
                save(directory, done, model, optimizers, best.state(), record)
                best.tidy()
            if stopping and not last and not best.exhausted:
                raise Stopped(
                    f"{directory.name}: stopped after step {done} of {schedule.steps}; "
                    "the same command goes on from there"
                )
    finish(model, best, directory.name)


def announce(schedule: Schedule, name: str) -> None:
    """What of the schedule this machine cannot do."""
    if schedule.precision == "bf16" and parallel.is_first() and not parallel.fast_bf16(parallel.device()):
        console.print(f"{name}: this CPU has no instructions for bf16: fp32 instead")


@contextmanager
def named_failures(name: str) -> Iterator[None]:
    """Numbers that are not finite are reported with the run they belong to."""
    try:
        yield
    except Diverged as error:
        raise Diverged(f"{name}: {error}") from None


def finish(model: PreTrainedModel, best: Best, name: str) -> None:
    """Leave the model with the weights that are to be exported."""
    kept = best.load_into(model)
    if parallel.is_first():
        if best.exhausted:
            console.print(f"{name}: no better validation than step {best.step}'s: training ends early")
        if kept:
            console.print(f"{name}: the weights of step {best.step}, the best validation")
    model.eval()


class Speed:
    """Steps and trained positions per second between two lines of the log."""

    def __init__(self, step: int) -> None:
        self._tokens, self._step, self._began = 0, step, time.monotonic()

    def count(self, tokens: int) -> None:
        """Of one step."""
        self._tokens += tokens

    def since_last(self, step: int) -> dict[str, float]:
        """Metrics since the last call."""
        now = time.monotonic()
        seconds = now - self._began
        speeds = {
            "steps_per_second": (step - self._step) / seconds,
            "tokens_per_second": self._tokens / seconds,
        }
        self._tokens, self._step, self._began = 0, step, now
        return speeds


class Updated(NamedTuple):
    """One optimizer step."""

    metrics: dict[str, Tensor]
    """This process's; their sum over the processes is the whole batch's, but for `grad_norm`, which is known
    to all.
    """
    positions: int
    """Trained positions of the whole batch."""


def update(
    model: PreTrainedModel,
    loss: Loss,
    prepare: Prepare,
    optimizers: list[Optimizer],
    batch: Batch,
    step: int,
    schedule: Schedule,
    seed: int,
) -> Updated:
    """One optimizer step on this process's share of the batch, which is prepared once.

    Raises Diverged, before the weights change, where a loss or the gradient is not finite.
    """
    torch.manual_seed(seed * 1_000_003 + step)  # a resumed run draws the same
    device = parallel.device()
    bf16 = schedule.precision == "bf16" and parallel.fast_bf16(device)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    accumulate, size = schedule.accumulate, parallel.size()
    batch.parts(accumulate * size)  # refuses what does not come out even
    mine = batch.parts(size)[parallel.rank()]
    with torch.no_grad(), amp:
        parts = prepare(model, mine.to(device)).parts(accumulate)
    positions = int(parallel.total(sum(part.positions for part in parts)))
    metrics: dict[str, Tensor] = defaultdict(float)
    losses = []
    for i, part in enumerate(parts):
        parallel.synchronise_gradients(model, i + 1 == accumulate)
        with amp:
            value, logged = loss(model, part)
        share = part.positions / positions
        (value * share * size).backward()  # the processes' gradients are averaged, not summed
        losses.append(value.detach())
        for name, metric in logged.items():
            metrics[name] += metric * share
    metrics["grad_norm"] = clip_grad_norm_(
        [p for p in model.parameters() if p.requires_grad], schedule.clip, foreach=True
    )
    check_finite(step, losses, metrics["grad_norm"])
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * learning_rate_factor(step, schedule)
        optimizer.step()
        optimizer.zero_grad()
    return Updated(metrics, positions)


def check_finite(step: int, losses: list[Tensor], norm: Tensor) -> None:
    """Raises Diverged, in all processes, where one of them has a loss or gradient that is not."""
    values = torch.stack([*losses, whole_number(norm).to(losses[0].device)])
    if parallel.any_of(not bool(values.isfinite().all())):
        *seen, size = [f"{value:g}" for value in values.tolist()]
        raise Diverged(
            f"step {step + 1}: the loss is {', '.join(seen)}, the norm of the gradient {size}; "
            "the weights and the last checkpoint are those of before"
        )


def whole_number(norm: Tensor) -> Tensor:
    """Of a norm that may be spread over the processes."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def averaged(metrics: dict[str, Tensor]) -> dict[str, float]:
    """The whole batch's metrics as numbers."""
    others = {k: parallel.total(float(v)) for k, v in metrics.items() if k != "grad_norm"}
    return others | {"grad_norm": float(whole_number(metrics["grad_norm"]))}


def learning_rate_factor(step: int, schedule: Schedule) -> float:
    """Linear warm-up, constant, linear to zero."""
    left = (schedule.steps - step) / (schedule.steps * schedule.decay)
    return min(1.0, (step + 1) / max(1, schedule.warmup), left)


def make_optimizers(model: PreTrainedModel, schedule: Schedule) -> list[Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for all else."""
    inner = []
    if schedule.optimizer == "muon":
        inner = [p for p in parallel.blocks_of(model).parameters() if p.requires_grad and p.ndim == 2]
    chosen = {id(p) for p in inner}
    outer = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    optimizers: list[Optimizer] = []
    if outer:
        optimizers += [AdamW(outer, betas=(0.9, 0.98), weight_decay=schedule.weight_decay, fused=True)]
    if inner:
        optimizers += [Muon(inner, weight_decay=schedule.weight_decay)]
    return optimizers
