"""The router's stage from served completions in `wheels train --dry-run`: pieces of it, multiplied.

Both models read a few completions of the full length, so times are upper bounds. A gateway that answers is
asked for a few completions.
"""

import time
from dataclasses import replace
from typing import NamedTuple

import torch

from measuring.examples import sources_of
from measuring.gateway import GatewayError
from measuring.trajectories import Trajectory, read_trajectories
from training.gate_config import GatewayRollouts, QualityGain, RecordedRollouts, RegretGain
from training.gating.served_calibration import passes_of
from training.gating.traffic import ROWS, Taught
from training.gating.traffic_stage import POSITIONS, TrafficStage
from training.models import parameters
from training.router_dry_run import peak_memory, start_peak
from training.tokenizer import encode_prompts, visible_ids


class Work(NamedTuple):
    """What the stage does, at most."""

    rounds: int
    completions: int
    """Of all rounds."""
    tokens: int
    """Of these completions."""
    asked: int
    """Completions that prices are found with."""
    forks: int
    """Begun completions that are finished for the gain `quality`: one for each token at most."""
    is_asked_for: bool
    """Whether a gateway writes all these for the stage."""


class ServedTrial(NamedTuple):
    """What the stage will take by the pieces that were measured."""

    work: Work
    reading: float
    """Seconds."""
    fits: float
    """Seconds."""
    completion: float | None
    """Seconds of one by the gateway, among others at the same time; None: it does not answer."""
    memory: float | None
    """Bytes beyond the models; None: not known here."""
    positions: int
    """That the gate is fitted on."""
    states: int
    """Bytes of the student's states there."""
    weights: int
    """Bytes of the models that read in this process."""


def try_served_router(stage: TrafficStage) -> ServedTrial:
    """Let both models read a few completions, and fit the gate to them. Nothing of it is kept."""
    work = work_of(stage)
    if isinstance(stage.config.gain, QualityGain):  # the forks of stand-ins tell nothing
        config = stage.config.model_copy(update={"gain": RegretGain(type="regret")})
        stage = replace(stage, config=config)
    model = stage.model
    weights = parameters(model) * model.dtype.itemsize
    if isinstance(stage.teacher, torch.nn.Module):
        weights += parameters(stage.teacher) * stage.teacher.dtype.itemsize
    served = stand_ins(stage)
    before = start_peak()
    began = time.monotonic()
    taught = stage.reader.taught(served, POSITIONS)
    read = time.monotonic()
    memory = None if before is None else peak_memory() - before
    stage.fitted(taught)
    fitted = time.monotonic()
    positions = min(work.tokens, POSITIONS)
    # Each round fits to all before it; the last trial leaves a tenth out.
    passes = (work.rounds + 1) / 2 + 0.9
    return ServedTrial(
        work=work,
        reading=(read - began) * positions / _positions(taught),
        fits=(fitted - read) * positions / _positions(taught) * passes,
        completion=seconds_of_a_completion(stage),
        memory=memory,
        positions=positions,
        states=positions * taught.lessons.states.shape[1] * torch.float32.itemsize,
        weights=weights,
    )


def work_of(stage: TrafficStage) -> Work:
    """Of a recipe."""
    config = stage.config
    rollouts = config.rollouts
    if isinstance(rollouts, RecordedRollouts):
        lengths = [len(trajectory.tokens) for trajectory in read_trajectories(rollouts.directory)]
        return Work(1, len(lengths), sum(lengths), 0, 0, is_asked_for=False)
    takes_routers = isinstance(rollouts, GatewayRollouts) and rollouts.takes_routers
    rounds = config.rounds if takes_routers else 1
    completions = rounds * config.prompts
    examples = min(config.calibration_examples, len(stage.task.valid())) if takes_routers else 0
    asked = examples * passes_of(len(config.budgets))
    tokens = completions * stage.max_tokens
    forks = tokens if isinstance(config.gain, QualityGain) else 0
    return Work(rounds, completions, tokens, asked, forks, is_asked_for=True)


def stand_ins(stage: TrafficStage) -> list[Trajectory]:
    """Prompts of the task with completions of any tokens, as long as they may be."""
    examples = stage.task.valid()[:ROWS]
    prompts = encode_prompts(stage.tokenizer, sources_of(examples))
    visible = visible_ids(stage.tokenizer)
    generator = torch.Generator().manual_seed(stage.seed)
    served = []
    for prompt in prompts:
        tokens = torch.randint(visible, (stage.max_tokens,), generator=generator).tolist()
        served.append(Trajectory(prompt, tokens))
    return served


def seconds_of_a_completion(stage: TrafficStage) -> float | None:
    """By the gateway of the recipe; None if there is none, or it does not answer."""
    rollouts = stage.config.rollouts
    if not isinstance(rollouts, GatewayRollouts):
        return None
    sources = sources_of(stage.task.valid()[: 2 * rollouts.concurrency])
    budgets = stage.config.budgets
    began = time.monotonic()
    try:
        replies = stage.gateway(rollouts).replies(sources, budgets[len(budgets) // 2])
    except GatewayError:
        return None
    return (time.monotonic() - began) / len(replies)


def _positions(taught: Taught) -> int:
    return len(taught.lessons)
