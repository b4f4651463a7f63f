"""Estimates the router's stage from served completions for `wheels train --dry-run`.

It measures pieces of the stage, and multiplies their times. Both models read a few completions of the full
length, so times are upper bounds. If the gateway is running, it writes a few completions.
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
    """Upper bounds of the work in the stage."""

    rounds: int
    """Number of rounds."""
    completions: int
    """Number of completions in all rounds."""
    tokens: int
    """Number of tokens in these completions."""
    asked: int
    """Number of completions for measuring prices."""
    forks: int
    """Number of begun completions that are finished for the gain `quality`: at most one for each token."""
    is_asked_for: bool
    """Whether a gateway writes all these completions for the stage; False for recorded ones."""


class ServedTrial(NamedTuple):
    """Time and memory of the stage, estimated from measured pieces."""

    work: Work
    reading: float
    """Seconds in which the models read the completions."""
    fits: float
    """Seconds of all fits of the gate."""
    completion: float | None
    """Seconds for each completion of the gateway, with concurrent requests; None: it does not answer."""
    memory: float | None
    """Bytes that reading takes in addition to the models; None: not known on this system."""
    positions: int
    """Number of positions that the gate is fitted on."""
    states: int
    """Bytes of the student's states at these positions."""
    weights: int
    """Bytes of the models that read in this process."""


def try_served_router(stage: TrafficStage) -> ServedTrial:
    """Let both models read a few completions, and fit the gate to them. No result is kept."""
    work = work_of(stage)
    if isinstance(stage.config.gain, QualityGain):  # forks of random completions would show nothing
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
    # Each round fits to the positions of all rounds so far; the last fit is repeated without a tenth of them.
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
    """Upper bounds of the work that a recipe's stage does."""
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
    """Prompts of the task with completions of random tokens, as long as the recipe allows."""
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
    """Seconds for one completion of the recipe's gateway; None if there is none or it does not answer."""
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
