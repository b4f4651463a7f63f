"""The recipe: one YAML file and `key=value` overrides; frozen, checked when built, unknown keys refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

Rate = Annotated[float, Field(gt=0, lt=1)]


class RecipeError(ValueError):
    """The recipe is missing, malformed, or sets something that does not exist; the message names it."""


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskConfig(Frozen):
    name: str
    options: dict[str, Any] = {}


class TokenizerConfig(Frozen):
    size: PositiveInt
    """Ids that the tokenizer knows; the models add the reserved rows behind them."""
    examples: PositiveInt = 20_000
    """Training examples that the merges are learned on."""


class Shape(Frozen):
    """A Llama of this size, trained from scratch."""

    hidden: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    feed_forward: PositiveInt
    head_dim: PositiveInt = 32
    """32 is the least that vLLM's CPU attention takes."""
    context: PositiveInt = 512


class Schedule(Frozen):
    """Warm-up, constant, then linear decay to zero (WSD), so that a run can be prolonged before its decay."""

    steps: PositiveInt
    batch: PositiveInt
    learning_rate: PositiveFloat
    warmup: NonNegativeInt = 100
    decay: Rate = 0.5
    """Share of the steps that decay."""
    weight_decay: float = 0.0
    clip: PositiveFloat = 1.0
    optimizer: Literal["adamw", "muon"] = "muon"
    compile: bool = True
    """Compile the decoder: nearly twice as fast for small models on a CPU, after half a minute."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products under autocast; weights and optimizer stay float32."""
    checkpoint_every: PositiveInt = 250
    log_every: PositiveInt = 25


class SFTConfig(Frozen):
    """Supervised fine-tuning on the references."""

    type: Literal["sft"]


class KDConfig(Frozen):
    """Word-level distillation: forward KL to the teacher on the references' prefixes."""

    type: Literal["kd"]


class GKDConfig(Frozen):
    """Generalised Jensen-Shannon divergence, on the student's own completions."""

    type: Literal["gkd"]
    beta: float = Field(default=1.0, ge=0, le=1)
    """0: forward KL, 1: reverse KL."""
    on_policy: float = Field(default=0.5, ge=0, le=1)
    """Share of the steps on the student's own completions; the others are on the references."""


class PCLConfig(Frozen):
    """Path consistency with V = 0: squared log-ratios, on own completions and references."""

    type: Literal["pcl"]
    window: NonNegativeInt = 0
    """Decisions of a sub-path; 0: one step, all actions."""
    clip: PositiveFloat = 4.0
    """Residuals count linearly beyond this, nats."""
    on_policy: float = Field(default=0.5, ge=0, le=1)


MethodConfig = Annotated[SFTConfig | KDConfig | GKDConfig | PCLConfig, Field(discriminator="type")]


class ModelConfig(Frozen):
    shape: Shape
    method: MethodConfig
    schedule: Schedule


class GateConfig(Frozen):
    """The gate over the frozen pair, and its calibration."""

    span_tokens: PositiveInt
    ask_tokens: PositiveInt
    """Tokens of one teacher call, at most a span."""
    width: PositiveInt = 64
    gain: Literal["regret", "excess", "ratio", "differs", "kl"]
    """What the score predicts, see `training.gates.GAINS`."""
    clip: PositiveFloat = 8.0
    """Cap of a token's gain, nats."""
    prompts: PositiveInt = 4000
    """Training sources of each round of rollouts."""
    rounds: PositiveInt = 2
    """The first round's rollouts ask at random, the later ones ask as the gate does."""
    explore: float = Field(default=0.1, ge=0, lt=1)
    rate: Rate = 0.15
    """Teacher rate that the on-policy rollouts aim at."""
    epochs: PositiveInt = 8
    batch: PositiveInt = 2048
    learning_rate: PositiveFloat = 3e-3
    weight_decay: float = 1e-4
    budgets: tuple[Rate, ...] = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.9)
    """Fractions that a price is calibrated for."""
    calibration_examples: PositiveInt = 500


class Recipe(Frozen):
    output: Path
    """Where teacher, student and router are exported to."""
    work: Path
    """Checkpoints and logs; a second run with the same recipe goes on where the first one ended."""
    seed: int = 0
    threads: PositiveInt = 1
    max_tokens: PositiveInt = 64
    """Longest completion in rollouts, calibration and evaluation."""
    task: TaskConfig
    tokenizer: TokenizerConfig
    teacher: ModelConfig
    student: ModelConfig
    router: GateConfig


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """`overrides`: `teacher.schedule.steps=10`; values are read as YAML. Raises RecipeError."""
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: {error}") from error
    for override in overrides or []:
        key, equals, value = override.partition("=")
        if not equals:
            raise RecipeError(f"override {override!r}: want key=value")
        *parents, last = key.split(".")
        at = data
        for parent in parents:
            at = at.setdefault(parent, {})
            if not isinstance(at, dict):
                raise RecipeError(f"override {override!r}: {parent} holds a value, not keys")
        at[last] = yaml.safe_load(value)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{path}: {error}") from error
