"""How a model is trained: the methods of a recipe, and its schedules."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from training.settings import BudgetPrompt, Frozen, Rate


class Schedule(Frozen):
    """Warm-up, constant, then linear decay to zero (WSD), so that a run can be extended before the decay."""

    steps: PositiveInt
    """Number of optimizer steps."""
    batch: PositiveInt
    """Number of examples in one optimizer step, over all processes."""
    accumulate: PositiveInt = 1
    """Number of parts into which a process splits its share of the batch: less memory, same gradient."""
    learning_rate: PositiveFloat
    """Learning rate after the warm-up and before the decay."""
    warmup: NonNegativeInt = 100
    """Number of steps until the full learning rate."""
    decay: Rate = 0.5
    """Share of the steps in which the learning rate decays."""
    weight_decay: float = 0.0
    """The optimizer's weight decay."""
    clip: PositiveFloat = 1.0
    """Largest norm of the gradient; larger gradients are scaled down."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """Optimizer: muon for training whole models, adamw for adapters."""
    compile: bool = True
    """Compile the decoder: nearly twice as fast for small models on a CPU, after half a minute."""
    gradient_checkpointing: bool = False
    """Recompute the activations inside a layer in the backward pass: less memory, a third more time."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of matrix products. bf16: under autocast, if the hardware supports it (not a CPU with only
    AVX2); weights and optimizer stay float32.
    """
    checkpoint_every: PositiveInt = 250
    """Number of steps between checkpoints."""
    log_every: PositiveInt = 25
    """Number of steps between log lines."""
    validate_every: NonNegativeInt = 0
    """Number of steps between validations (greedy completions, scored by the task); 0: never."""
    validate_examples: PositiveInt = 100
    """Number of examples in each validation."""
    keep: Literal["last", "best"] = "last"
    """Which weights to export: those of the last step, or of the best validation."""
    patience: NonNegativeInt = 0
    """Number of validations without improvement after which training ends; 0: it runs to the last step."""

    @model_validator(mode="after")
    def _validated(self) -> Self:
        if not self.validate_every and (self.keep == "best" or self.patience):
            raise ValueError("keep: best and patience need validate_every")
        return self


class MethodBase(Frozen):
    """A training method, and what it needs."""

    needs_teacher: ClassVar[bool] = True
    """Whether the method needs a teacher."""
    teacher_in_process: ClassVar[bool] = False
    """Whether the teacher must be in process, and not behind a URL."""

    @property
    def needs_references(self) -> bool:
        """Whether the method trains on right answers of the task."""
        return True


class SupervisedConfig(MethodBase):
    """Fine-tuning on whole answers, whoever wrote them."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the probability that all tokens get equally; makes a teacher less overconfident if there is
    little data.
    """


class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning on the references."""

    needs_teacher: ClassVar[bool] = False
    type: Literal["sft"]


class SeqKDConfig(SupervisedConfig):
    """Sequence-level distillation: fine-tuning on the teacher's own completions."""

    teacher_in_process: ClassVar[bool] = True
    type: Literal["seqkd"]
    temperature: float = Field(default=0.0, ge=0)
    """Temperature of the teacher's completions. 0: greedy; 1: drawn from the teacher's distribution."""

    @property
    def needs_references(self) -> bool:
        """False: the method trains on what the teacher writes."""
        return False


class KDConfig(MethodBase):
    """Word-level distillation: forward KL to the teacher on the references' prefixes."""

    type: Literal["kd"]
    temperature: PositiveFloat = 1.0
    """Temperature of both distributions: above 1, the teacher's less likely tokens count more. The loss is
    multiplied by its square, so that gradients keep their size.
    """


class GKDConfig(MethodBase):
    """Generalised Jensen-Shannon divergence, on the student's own completions."""

    type: Literal["gkd"]
    beta: float = Field(default=1.0, ge=0, le=1)
    """Weight between the divergences. 0: forward KL; 1: reverse KL."""
    temperature: PositiveFloat = 1.0
    """Temperature of both distributions, as in `kd`; completions are drawn at 1."""
    on_policy: float = Field(default=0.5, ge=0, le=1)
    """Share of the steps on the student's own completions; the others are on the references."""

    @property
    def needs_references(self) -> bool:
        """Whether some steps are on references."""
        return self.on_policy < 1


class PCLConfig(MethodBase):
    """Path consistency with V = 0: squared log-ratios, on the student's own completions and on references."""

    type: Literal["pcl"]
    window: NonNegativeInt = 0
    """Number of decisions in a sub-path; 0: sub-paths of one step, with the residuals of all tokens."""
    clip: PositiveFloat = 4.0
    """Size of a residual, in nats, beyond which the loss grows linearly."""
    on_policy: float = Field(default=0.5, ge=0, le=1)
    """Share of each step's rows that hold the student's own completions; the others hold references."""

    @property
    def needs_references(self) -> bool:
        """Whether some rows hold references."""
        return self.on_policy < 1


class JointConfig(MethodBase):
    """Trains a student further with its router: distillation at the positions at which the gate does not ask.

    See `training.methods.joint`. The router's stage then fits the gate to the new student.
    """

    teacher_in_process: ClassVar[bool] = True
    type: Literal["joint"]
    router: Path
    """Directory of the router checkpoint that was trained with the student."""
    rates: tuple[Rate, ...] = (0.05, 0.1, 0.2, 0.3)
    """Fractions to train for, at their calibrated prices."""
    temperature: PositiveFloat = 0.2
    """Temperature of asking, in units of the score."""
    anchor: float = Field(default=0.1, ge=0)
    """Weight of the distillation that is added at every position, even if the gate asks there."""
    budget_prompt: BudgetPrompt | None = None
    """Template of the budget in words, for a router with `conditioning: prompt`; None: no words."""


MethodConfig = Annotated[
    SFTConfig | SeqKDConfig | KDConfig | GKDConfig | PCLConfig | JointConfig, Field(discriminator="type")
]


class TrainingPlan(NamedTuple):
    """Method and schedule by which a model is trained."""

    method: MethodConfig
    schedule: Schedule


class RolloutConfig(Frozen):
    """A vLLM server that writes the model's own completions; see `training.rollout_server`."""

    url: str
    """Address of the vLLM server, with or without /v1."""
    directory: Path | None = None
    """Directory for passing the weights, which trainer and server can read; None: `rollouts` in the model's
    work directory.
    """
    every: PositiveInt = 1
    """Number of batches drawn between transfers of the weights."""
