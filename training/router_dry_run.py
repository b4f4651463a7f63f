"""Estimates the router stage for `wheels train --dry-run`: runs a small stage, and extrapolates its times."""

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
from training.gating.tree import KEPT_BYTES
from training.models import parameters
from training.tasks import Task
from training.tokenizer import encode_prompts

PROMPTS = 8
"""Number of prompts in the first measured round of rollouts."""
EXAMPLES = 2
"""Number of examples in the first measured calibration."""
LARGER = 8
"""Size of the second stage as a multiple of the first; two sizes tell fixed from proportional times."""
PATIENCE = 30.0
"""Longest first stage after which a second one is run, in seconds."""
CLEAR_PEAK = Path("/proc/self/clear_refs")
"""File in which writing 5 resets the peak memory of this process (Linux)."""


class RouterTrial(NamedTuple):
    """Time and memory of the whole stage, estimated from small stages."""

    rollouts: float
    """Seconds of the rollouts, including the fit of the gate."""
    calibration: float | None
    """Seconds of the calibration; None: unknown, because untrained models differ at every token."""
    rows: int
    """Number of completions written at once."""
    memory: float | None
    """Bytes that writing them takes in addition to the models; None: not known on this system."""
    kept: float
    """Bytes of the validation prompts' keys and values, which the calibration keeps, at most."""
    positions: int
    """Number of positions that the gate is fitted on, at most."""
    states: int
    """Bytes of the student's states at these positions."""
    weights: int
    """Bytes of all models."""


def try_router(recipe: Recipe, pair: FrozenPair, task: Task, *, trained: bool) -> RouterTrial:
    """Run a small stage, and a larger one if the first was quick. No result is kept.

    Args:
        recipe: the recipe of the pair.
        pair: the models, or stand-ins for them.
        task: the task that gives the prompts.
        trained: whether these are the models that the stage will have; if not, nothing is calibrated.
    """
    config = recipe.router
    valid = task.valid()[: config.calibration_examples]
    prompts = encode_prompts(pair.tokenizer, sources_of(valid))
    loop = pair.load()
    rows = min(ROWS, loop.rows_of(max(map(len, prompts))), config.prompts)
    memory = memory_of(loop, prompts, rows)  # first: later steps free memory that would be reused
    weights = sum(map(parameters, (loop.student, loop.teacher, *loop.cheaper))) * torch.float32.itemsize
    width = loop.student.config.get_text_config().hidden_size
    kept = min(KEPT_BYTES, loop.token_bytes * sum(map(len, prompts)))
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
        kept=kept,
        positions=positions,
        states=positions * width * torch.float32.itemsize,
        weights=weights,
    )


class Timed(NamedTuple):
    """The measured time of a piece of work."""

    size: int
    """Number of prompts or examples."""
    seconds: float


class SmallStage(NamedTuple):
    """The measured times of a small stage."""

    rollouts: Timed
    calibration: Timed

    @property
    def seconds(self) -> float:
        """Seconds of rollouts and calibration together."""
        return self.rollouts.seconds + self.calibration.seconds


def small_stage(recipe: Recipe, pair: FrozenPair, task: Task, prompts: int, examples: int) -> SmallStage:
    """Run one round of rollouts, fit the gate and calibrate it.

    Args:
        recipe: the recipe of the pair.
        pair: the models.
        task: the task that gives the prompts.
        prompts: number of prompts; at most as many as the recipe has are used.
        examples: number of examples to calibrate on, limited in the same way; 0: nothing is calibrated.
    """
    config = recipe.router
    prompts = min(prompts, config.prompts)
    examples = min(examples, config.calibration_examples, len(task.valid()))
    few = {"prompts": prompts, "rounds": 1, "calibration_examples": max(1, examples)}
    stage = RouterStage(pair, task, config.model_copy(update=few), recipe.seed)
    _ = stage.loop  # loaded before the clock starts
    with TemporaryDirectory() as work, redirect_stdout(io.StringIO()):
        began = time.monotonic()
        gate = stage.fitted(Path(work)).trained.head.gate
        fitted = time.monotonic()
        if examples:
            stage.calibrated(gate)
        ended = time.monotonic()
    return SmallStage(Timed(prompts, fitted - began), Timed(examples, ended - fitted))


def projected(first: Timed, second: Timed, count: int, batches: int) -> float:
    """Seconds for `count` prompts or examples, extrapolated from two measured pieces.

    The two pieces may be the same one. The part of the time that does not grow with the size of a piece is
    spent once for each batch.
    """
    if second.size == first.size:
        return first.seconds * count / first.size
    each = max(0.0, (second.seconds - first.seconds) / (second.size - first.size))
    fixed = max(0.0, first.seconds - each * first.size)
    return fixed * batches + each * count


def memory_of(loop: ClosedLoop, prompts: list[list[int]], rows: int) -> float | None:
    """Bytes that `rows` concurrent completions of the longest prompts take, estimated from a few of them.

    None if the system does not show it.
    """
    longest = sorted(prompts, key=len)[-PROMPTS:]
    before = start_peak()
    if before is None:
        return None
    loop.write([Request(prompt) for prompt in longest])
    return (peak_memory() - before) / len(longest) * rows


def start_peak() -> float | None:
    """Reset the peak of memory, and return the bytes in use; None if the system cannot do that."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory freed earlier would be reused unseen
        CLEAR_PEAK.write_text("5")
    except (OSError, AttributeError):
        return None
    return peak_memory()


def peak_memory() -> float:
    """Peak memory of the GPU, or of the whole process if there is no GPU, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
