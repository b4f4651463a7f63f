"""The training loop: batch, step, log, checkpoint. A killed run resumes and repeats itself exactly.

A step's batch is split into equal parts over the processes (`training.parallel`), prepared, and split over
`schedule.accumulate` passes. The loss of each pass is weighted by its share of the positions. So the gradient
is that of the whole batch, however it is split.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from training import parallel
from training.batches import Batch, BatchLoss
from training.loop.best import Best
from training.loop.checkpoints import restore, save
from training.loop.muon import Muon
from training.loop.progress import Log, Progress, console
from training.loop.stopping import Diverged, Stopped, StopRequests, stop_requests
from training.method_config import Schedule
from training.models import trained
from training.sampling import evaluating

Loss = Callable[[PreTrainedModel, Batch], BatchLoss]
"""Computes the loss of a prepared batch."""
Prepare = Callable[[PreTrainedModel, Batch], Batch]
"""Makes the batch for the loss, e.g. with the model's own completions; called without gradient."""
Validate = Callable[[PreTrainedModel], dict[str, float]]
"""Validates a model, and returns scalars to log."""


Record = dict[str, Any]


class Batches(Protocol):
    """The batches of a run, by step, the same in every process."""

    def __getitem__(self, step: int) -> Batch: ...


def unchanged(model: PreTrainedModel, batch: Batch) -> Batch:
    """The batch itself, for a loss that needs no preparation."""
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
    """Train `model` in place for `schedule.steps`, from the checkpoint in `directory` if there is one.

    Args:
        model: the model, which is changed in place.
        loss: computes the loss to minimise.
        batches: the batches, by step.
        schedule: steps, optimizer and learning rates.
        directory: directory of checkpoints and log.
        prepare: makes the batch for the loss.
        validate: validates the model; None: no validation.
        seed: seed of all random numbers in a step.
        record: the record of this stage, kept in the checkpoint.
        trackers: names of trackers in `training.loop.trackers.TRACKERS`.

    Raises:
        Stopped: on SIGTERM or SIGINT, after writing a checkpoint.
        Diverged: a loss, a gradient or a metric is not finite; the last checkpoint stays as it is.
    """
    optimizers = make_optimizers(model, schedule)
    start, state = restore(directory, model, optimizers)
    best = Best(directory, schedule, state)
    announce(schedule, directory.name)
    model.train()
    run = Run(model, loss, prepare, validate, schedule, directory, seed, record, optimizers, best)
    with (
        named_failures(directory.name),
        stop_requests() as stop,
        Log(directory, start, trackers) as log,
        Progress(directory.name, start, schedule.steps) as progress,
    ):
        run.go_on(batches, start, log, progress, stop)
    finish(model, best, directory.name)


@dataclass(frozen=True)
class Run:
    """The training of one model, from its checkpoint to its last step."""

    model: PreTrainedModel
    loss: Loss
    prepare: Prepare
    validate: Validate | None
    schedule: Schedule
    directory: Path
    seed: int
    record: Record | None
    optimizers: list[Optimizer]
    best: Best

    def go_on(self, batches: Batches, start: int, log: Log, progress: Progress, stop: StopRequests) -> None:
        """Run all steps from `start` on; see `train` for the errors."""
        schedule = self.schedule
        speed = Speed(start)
        for step in range(start, schedule.steps):
            if self.best.exhausted:
                return
            metrics, count = self.update(batches[step], step)
            done = step + 1
            speed.count(count)
            progress.advance(count)
            if self._is_due(done, schedule.log_every):
                log.write(done, averaged(metrics) | speed.since_last(done))
            if self.validate is not None and self._is_due(done, schedule.validate_every):
                self._note(self.validate, done, log)
            stopping = parallel.any_of(stop.requested)
            if self._is_due(done, schedule.checkpoint_every) or stopping or self.best.exhausted:
                save(self.directory, done, self.model, self.optimizers, self.best.state(), self.record)
                self.best.tidy()
            if stopping and done < schedule.steps and not self.best.exhausted:
                raise Stopped(
                    f"{self.directory.name}: stopped after step {done} of {schedule.steps}; "
                    "run the same command to continue"
                )

    def update(self, batch: Batch, step: int) -> "Updated":
        """Make one optimizer step, see `update`."""
        return update(
            self.model,
            self.loss,
            self.prepare,
            self.optimizers,
            batch,
            step,
            self.schedule,
            self.seed,
        )

    def _is_due(self, done: int, every: int) -> bool:
        """Whether an action of every `every` steps is due, also after the last step; 0: never."""
        return every > 0 and (done % every == 0 or done == self.schedule.steps)

    def _note(self, validate: Validate, done: int, log: Log) -> None:
        with evaluating(self.model):
            scores = validate(self.model)
        log.write(done, scores)
        self.best.note(done, scores, self.model)


def announce(schedule: Schedule, name: str) -> None:
    """Print which settings of the schedule this machine does not support."""
    if schedule.precision == "bf16" and parallel.is_first() and not parallel.fast_bf16(parallel.device()):
        console.print(f"{name}: this CPU has no bf16 instructions, so fp32 is used")


@contextmanager
def named_failures(name: str) -> Iterator[None]:
    """Add the run's name to the message of Diverged, if the block raises it."""
    try:
        yield
    except Diverged as error:
        raise Diverged(f"{name}: {error}") from None


def finish(model: PreTrainedModel, best: Best, name: str) -> None:
    """Load the weights to export into the model."""
    kept = best.load_into(model)
    if parallel.is_first():
        if best.exhausted:
            console.print(f"{name}: no validation was better than at step {best.step}: training ends early")
        if kept:
            console.print(f"{name}: using the weights of step {best.step}, the best validation")
    model.eval()


class Speed:
    """Steps and trained positions per second between two lines of the log."""

    def __init__(self, step: int) -> None:
        self._tokens = 0
        self._step = step
        self._began = time.monotonic()

    def count(self, tokens: int) -> None:
        """Add the trained positions of one step."""
        self._tokens += tokens

    def since_last(self, step: int) -> dict[str, float]:
        """Steps and trained positions per second since the last call, as metrics."""
        now = time.monotonic()
        seconds = now - self._began
        speeds = {
            "steps_per_second": (step - self._step) / seconds,
            "tokens_per_second": self._tokens / seconds,
        }
        self._tokens = 0
        self._step = step
        self._began = now
        return speeds


class Updated(NamedTuple):
    """The result of one optimizer step."""

    metrics: dict[str, Tensor]
    """This process's part of each metric, whose sum over the processes is the metric of the whole batch. Only
    `grad_norm` is already that of the whole batch.
    """
    positions: int
    """Number of trained positions in the whole batch."""


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
    """Make one optimizer step on this process's share of the batch, which is prepared once.

    Raises:
        Diverged: a loss or the gradient is not finite; the weights are unchanged.
    """
    torch.manual_seed(seed * 1_000_003 + step)  # so a resumed run draws the same numbers
    device = parallel.device()
    bf16 = schedule.precision == "bf16" and parallel.fast_bf16(device)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    accumulate = schedule.accumulate
    size = parallel.size()
    batch.parts(accumulate * size)  # refuses a batch that does not split evenly
    mine = batch.parts(size)[parallel.rank()]
    with torch.no_grad(), amp:
        parts = prepare(model, mine.to(device)).parts(accumulate)
    positions = int(parallel.total(sum(part.positions for part in parts)))
    metrics: dict[str, Tensor] = {}
    losses = []
    for i, part in enumerate(parts):
        parallel.synchronise_gradients(model, i + 1 == accumulate)
        with amp:
            value, logged = loss(model, part)
        share = part.positions / positions
        (value * share * size).backward()  # the processes' gradients are averaged, not summed
        losses.append(value.detach())
        for name, metric in logged.items():
            metrics[name] = metrics.get(name, 0.0) + metric * share
    metrics["grad_norm"] = clip_grad_norm_(trained(model), schedule.clip, foreach=True)
    check_finite(step, losses, metrics["grad_norm"])
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * learning_rate_factor(step, schedule)
        optimizer.step()
        optimizer.zero_grad()
    return Updated(metrics, positions)


def check_finite(step: int, losses: list[Tensor], norm: Tensor) -> None:
    """Raises Diverged in all processes, if one of them has a loss or a gradient that is not finite."""
    values = torch.stack([*losses, whole_number(norm).to(losses[0].device)])
    if parallel.any_of(not bool(values.isfinite().all())):
        *seen, size = [f"{value:g}" for value in values.tolist()]
        raise Diverged(
            f"step {step + 1}: the loss is {', '.join(seen)}, the norm of the gradient {size}; "
            "the weights and the last checkpoint are unchanged"
        )


def whole_number(norm: Tensor) -> Tensor:
    """The whole value of a norm that may be sharded over the processes."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def averaged(metrics: dict[str, Tensor]) -> dict[str, float]:
    """The metrics of the whole batch as numbers, summed over all processes."""
    numbers = {}
    for name, metric in metrics.items():
        if name == "grad_norm":
            numbers[name] = float(whole_number(metric))
        else:
            numbers[name] = parallel.total(float(metric))
    return numbers


def learning_rate_factor(step: int, schedule: Schedule) -> float:
    """Factor of the learning rate at a step: linear warm-up, constant, linear decay to zero."""
    left = (schedule.steps - step) / (schedule.steps * schedule.decay)
    return min(1.0, (step + 1) / max(1, schedule.warmup), left)


def make_optimizers(model: PreTrainedModel, schedule: Schedule) -> list[Optimizer]:
    """The schedule's optimizers: AdamW, and with `muon` also Muon for the matrices inside the layers."""
    inner = []
    if schedule.optimizer == "muon":
        inner = [matrix for matrix in trained(parallel.blocks_of(model)) if matrix.ndim == 2]
    chosen = set(map(id, inner))
    outer = [parameter for parameter in trained(model) if id(parameter) not in chosen]
    optimizers: list[Optimizer] = []
    if outer:
        optimizers += [AdamW(outer, betas=(0.9, 0.98), weight_decay=schedule.weight_decay, fused=True)]
    if inner:
        optimizers += [Muon(inner, weight_decay=schedule.weight_decay)]
    return optimizers
