"""The router stage in `wheels train --dry-run`: runs a small stage and extrapolates its times."""

import ctypes
import io
import resource
import time
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from measuring.examples import sources_of
from training.config import Recipe
from training.gating.rollout import ROWS, ClosedLoop, Request
from training.gating.router_stage import FrozenPair, RouterStage
from training.models import parameters
from training.tasks import Task
from training.tokenizer import encode_prompts

PROMPTS = 8
"""Of the measured round of rollouts."""
EXAMPLES = 2
"""Of the measured calibration."""
LARGER = 8
"""How many times as large the second stage is, which tells what grows with it from what does not."""
PATIENCE = 30.0
"""Seconds of the first stage after which there is no second one."""
CLEAR_PEAK = Path("/proc/self/clear_refs")
"""Writing 5 there forgets the largest size that this process had (Linux)."""


class RouterTrial(NamedTuple):
    """What the whole stage will take by the small ones that were run."""

    rollouts: float
    """Seconds, with the fit of the gate."""
    calibration: float | None
    """Seconds; None: of models that are not trained yet, which differ at every token, nothing is learned."""
    rows: int
    """Completions that are written at once."""
    memory: float | None
    """Bytes that writing them takes beyond the models; None: not known here."""
    positions: int
    """That the gate is fitted on."""
    states: int
    """Bytes of the student's states there."""
    weights: int
    """Bytes of all models."""


def try_router(recipe: Recipe, pair: FrozenPair, task: Task, *, trained: bool) -> RouterTrial:
    """Run a small stage, and a larger one if that was quick. Nothing of them is kept.

    Args:
        recipe: of the pair.
        pair: the models, or what stands in for them.
        task: gives the prompts.
        trained: whether these are the models that the stage will have; else nothing is calibrated.
    """
    config = recipe.router
    valid = task.valid()[: config.calibration_examples]
    prompts = encode_prompts(pair.tokenizer, sources_of(valid))
    loop = pair.load()
    rows = min(ROWS, loop.rows_of(max(map(len, prompts))), config.prompts)
    memory = memory_of(loop, prompts, rows)  # before anything else leaves memory that can be used again
    weights = sum(map(parameters, (loop.student, loop.teacher, *loop.cheaper))) * torch.float32.itemsize
    width = loop.student.config.get_text_config().hidden_size
    del loop
    examples = EXAMPLES if trained else 0
    first = small_stage(recipe, pair, task, PROMPTS, examples)
    second = first
    if first.seconds < PATIENCE:
        second = small_stage(recipe, pair, task, LARGER * PROMPTS, LARGER * examples)
    calibration = projected(first.calibration, second.calibration, len(valid), 1) if trained else None
    completions = config.prompts * config.rounds
    positions = completions * recipe.max_tokens
    return RouterTrial(
        rollouts=projected(first.rollouts, second.rollouts, completions, -(-completions // rows)),
        calibration=calibration,
        rows=rows,
        memory=memory,
        positions=positions,
        states=positions * width * torch.float32.itemsize,
        weights=weights,
    )


class Timed(NamedTuple):
    """A measured piece."""

    size: int
    """Prompts, or examples."""
    seconds: float


class SmallStage(NamedTuple):
    """A small stage that was run."""

    rollouts: Timed
    calibration: Timed

    @property
    def seconds(self) -> float:
        """Of both."""
        return self.rollouts.seconds + self.calibration.seconds


def small_stage(recipe: Recipe, pair: FrozenPair, task: Task, prompts: int, examples: int) -> SmallStage:
    """One round of this many prompts, calibrated on this many examples, or on all that the recipe takes.

    With no examples nothing is calibrated.
    """
    config = recipe.router
    prompts = min(prompts, config.prompts)
    examples = min(examples, config.calibration_examples, len(task.valid()))
    few = {"prompts": prompts, "rounds": 1, "calibration_examples": max(1, examples)}
    stage = RouterStage(pair, task, config.model_copy(update=few), recipe.seed)
    _ = stage.loop  # loaded before the time counts
    with TemporaryDirectory() as work, redirect_stdout(io.StringIO()):
        began = time.monotonic()
        gate = stage.fitted(Path(work)).trained.head.gate
        fitted = time.monotonic()
        if examples:
            stage.calibrated(gate)
        ended = time.monotonic()
    return SmallStage(Timed(prompts, fitted - began), Timed(examples, ended - fitted))


def projected(first: Timed, second: Timed, count: int, batches: int) -> float:
    """Seconds of `count`, from two measured pieces, of which the second may be the first.

    What does not grow with a piece is spent once for each batch.
    """
    if second.size == first.size:
        return first.seconds * count / first.size
    each = max(0.0, (second.seconds - first.seconds) / (second.size - first.size))
    fixed = max(0.0, first.seconds - each * first.size)
    return fixed * batches + each * count


def memory_of(loop: ClosedLoop, prompts: list[list[int]], rows: int) -> float | None:
    """Bytes that this many completions of the longest prompts take at once, from a few of them."""
    longest = sorted(prompts, key=len)[-PROMPTS:]
    before = start_peak()
    if before is None:
        return None
    loop.write([Request(prompt) for prompt in longest])
    return (peak_memory() - before) / len(longest) * rows


def start_peak() -> float | None:
    """Forget the peak so far, and return the bytes that are in use; None where that is not possible."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be used again, unseen
        CLEAR_PEAK.write_text("5")
    except (OSError, AttributeError):
        return None
    return peak_memory()


def peak_memory() -> float:
    """Of the GPU, or of the whole process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
