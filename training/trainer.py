"""The training loop: batch, step, log, checkpoint; a killed run resumes and repeats itself exactly."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Muon, Optimizer
from torch.utils.tensorboard import SummaryWriter

from training.batches import Batch
from training.config import Schedule

Loss = Callable[[Any, Batch], tuple[Tensor, dict[str, Tensor]]]


class Batches(Protocol):
    def __getitem__(self, step: int) -> Batch: ...


def train(model: nn.Module, loss: Loss, batches: Batches, schedule: Schedule, directory: Path) -> None:
    """Train `model` in place for `schedule.steps`, from `directory`'s checkpoint where there is one."""
    optimizers = make_optimizers(model, schedule)
    log = Log(directory)
    start = restore(directory, model, optimizers)
    log.truncate(start)
    model.train()
    began = time.monotonic()
    for step in range(start, schedule.steps):
        batch = batches[step]
        with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=schedule.precision == "bf16"):
            value, metrics = loss(model, batch)
        value.backward()
        metrics["grad_norm"] = clip_grad_norm_(model.parameters(), schedule.clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate * learning_rate_factor(step, schedule)
            optimizer.step()
            optimizer.zero_grad()
        done = step + 1
        if done % schedule.log_every == 0 or done == schedule.steps:
            rate = (done - start) / (time.monotonic() - began)
            log.write(done, {k: float(v) for k, v in metrics.items()} | {"steps_per_second": rate})
        if done % schedule.checkpoint_every == 0 or done == schedule.steps:
            checkpoint(directory, done, model, optimizers)
    log.close()
    model.eval()


def learning_rate_factor(step: int, schedule: Schedule) -> float:
    """Linear warm-up, constant, linear to zero."""
    left = (schedule.steps - step) / (schedule.steps * schedule.decay)
    return min(1.0, (step + 1) / max(1, schedule.warmup), left)


def make_optimizers(model: nn.Module, schedule: Schedule) -> list[Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices inside the blocks, at AdamW's scale; AdamW for all else."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inner = [p for name, p in trained if schedule.optimizer == "muon" and p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in inner}
    outer = [p for _, p in trained if id(p) not in chosen]
    adamw = AdamW(outer, betas=(0.9, 0.98), weight_decay=schedule.weight_decay, fused=True)
    if not inner:
        return [adamw]
    muon = Muon(inner, weight_decay=schedule.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


CHECKPOINT = "checkpoint.pt"


def checkpoint(directory: Path, step: int, model: nn.Module, optimizers: list[Optimizer]) -> None:
    """Atomic: a kill leaves the old one or the new one."""
    state = {"step": step, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
             "rng": torch.get_rng_state()}  # fmt: skip
    scratch = directory / (CHECKPOINT + ".tmp")
    torch.save(state, scratch)
    os.replace(scratch, directory / CHECKPOINT)


def restore(directory: Path, model: nn.Module, optimizers: list[Optimizer]) -> int:
    """Step to go on from; 0 without a checkpoint."""
    if not (directory / CHECKPOINT).exists():
        return 0
    state = torch.load(directory / CHECKPOINT, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    torch.set_rng_state(state["rng"])
    return state["step"]


class Log:
    """Scalars to `log.jsonl` and TensorBoard."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._file = directory, directory / "log.jsonl"
        self._board: SummaryWriter | None = None

    def truncate(self, step: int) -> None:
        """Forget what lies behind the checkpoint: it will be run again."""
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self._file.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= step))
        self._board = SummaryWriter(self._directory / "tensorboard", purge_step=step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if not all(map(math.isfinite, metrics.values())):
            raise FloatingPointError(f"step {step}: a metric is not finite: {metrics}")
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step} | metrics) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        print(
            f"{self._directory.name} {step} " + " ".join(f"{k}={v:.4g}" for k, v in metrics.items()),
            flush=True,
        )

    def close(self) -> None:
        self._board.close()
