"""The models of a recipe: student, teacher and cheaper teachers, and where each comes from."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag, model_validator

from router.address import base_url
from training.method_config import MethodConfig, RolloutConfig, Schedule, TrainingPlan
from training.settings import Frozen

Role = Literal["teacher", "student"]

ROLES: tuple[Role, ...] = ("teacher", "student")


class Shape(Frozen):
    """The size of a Llama that is trained from scratch."""

    hidden: PositiveInt
    """Width of the hidden state."""
    layers: PositiveInt
    """Number of layers."""
    heads: PositiveInt
    """Number of attention heads in each layer."""
    feed_forward: PositiveInt
    """Width inside a layer's feed-forward part."""
    head_dim: PositiveInt = 32
    """Width of an attention head; vLLM's CPU attention needs at least 32."""
    context: PositiveInt = 512
    """Longest text of prompt and answer, in tokens."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the embeddings and of each block's output in training; useful with little data."""


class ScratchConfig(Frozen):
    """A model trained from scratch."""

    is_ready: ClassVar[bool] = False
    dtype: ClassVar[str] = "float32"
    shape: Shape
    """Size of the model."""
    method: MethodConfig
    """Method that trains the model."""
    schedule: Schedule
    """Length of the training, optimizer and learning rates."""
    rollouts: RolloutConfig | None = None
    """A vLLM server that writes the model's own completions; None: the trainer writes them."""

    @property
    def plan(self) -> TrainingPlan:
        """Method and schedule of the training."""
        return TrainingPlan(self.method, self.schedule)


class LoraConfig(Frozen):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), trained instead of the weights."""

    rank: PositiveInt = 16
    """Rank of each adapter."""
    alpha: PositiveFloat = 32
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the adapters' inputs in training."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the modules that get an adapter; by default all linear modules except the output matrix."""


class PretrainedConfig(Frozen):
    """A pretrained model; trained further if it has a method and a schedule, otherwise used as it is."""

    pretrained: str
    """Directory, or hub name: OWNER/NAME, or OWNER/NAME@REVISION."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights; keep float32 for a model that is trained."""
    lora: LoraConfig | None = None
    """Adapters to train instead of the weights; None: train all weights."""
    method: MethodConfig | None = None
    """Method that trains the model further; None: the model is used as it is."""
    schedule: Schedule | None = None
    """Length of the training, optimizer and learning rates; set it if and only if you set `method`."""
    rollouts: RolloutConfig | None = None
    """A vLLM server that writes the model's own completions; None: the trainer writes them."""

    @property
    def is_ready(self) -> bool:
        """Whether the model is used as it is, without training."""
        return self.plan is None

    @property
    def plan(self) -> TrainingPlan | None:
        """Method and schedule of the training; None: the model is not trained."""
        if self.method is None or self.schedule is None:
            return None
        return TrainingPlan(self.method, self.schedule)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.method is None) != (self.schedule is None):
            raise ValueError("set both method and schedule, or neither")
        if self.method is None and (self.lora is not None or self.rollouts is not None):
            raise ValueError("lora and rollouts need a method and a schedule")
        return self


class PruneConfig(Frozen):
    """The part of the teacher that a student starts from."""

    layers: PositiveInt
    """Number of the teacher's layers to keep: the first, the last, and others evenly spaced between them."""


class PrunedConfig(Frozen):
    """A student that starts as a few layers of the trained teacher, see `training.pruning`."""

    is_ready: ClassVar[bool] = False
    prune: PruneConfig
    """How much of the teacher to keep."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    method: MethodConfig
    """Method that trains the model."""
    schedule: Schedule
    """Length of the training, optimizer and learning rates."""
    rollouts: RolloutConfig | None = None
    """A vLLM server that writes the model's own completions; None: the trainer writes them."""

    @property
    def plan(self) -> TrainingPlan:
        """Method and schedule of the training."""
        return TrainingPlan(self.method, self.schedule)


class ServedConfig(Frozen):
    """A teacher behind a vLLM server's URL."""

    is_ready: ClassVar[bool] = False
    method: ClassVar[None] = None
    plan: ClassVar[None] = None
    url: str
    """Address of the vLLM server, with or without /v1."""
    model: str | None = None
    """The model's name at the server; None: the only model there."""
    top_logprobs: int = Field(default=20, ge=2)
    """Number of likeliest tokens to request at every position (at most the server's `--max-logprobs`). All
    other tokens count as one event.
    """

    @property
    def known_as(self) -> str:
        """Name under which the cache keeps the teacher's answers: its URL."""
        return base_url(self.url)


class CheaperReadyConfig(Frozen):
    """A cheaper teacher in process, used as it is."""

    cost: float = Field(gt=0, le=1)
    """Cost of its token, if a token of `teacher` costs 1. Its price is this times the common price."""
    pretrained: str
    """Directory, or hub name: OWNER/NAME, or OWNER/NAME@REVISION."""


class CheaperServedConfig(ServedConfig):
    """A cheaper teacher behind a vLLM server's URL."""

    cost: float = Field(gt=0, le=1)
    """Cost of its token, if a token of `teacher` costs 1. Its price is this times the common price."""


def _kind(value: Any) -> str | None:
    keys = value.keys() if isinstance(value, dict) else value.__dict__.keys()
    for kind in ("shape", "pretrained", "prune", "url"):
        if kind in keys:
            return f"({kind})"
    return None


Scratch = Annotated[ScratchConfig, Tag("(shape)")]
Pretrained = Annotated[PretrainedConfig, Tag("(pretrained)")]
Pruned = Annotated[PrunedConfig, Tag("(prune)")]
WHICH = Discriminator(
    _kind,
    custom_error_type="model",
    custom_error_message="a model has shape, pretrained, (student) prune or (teacher) url",
)
ModelConfig = ScratchConfig | PretrainedConfig | PrunedConfig
StudentConfig = Annotated[Scratch | Pretrained | Pruned, WHICH]
TeacherConfig = Annotated[Scratch | Pretrained | Annotated[ServedConfig, Tag("(url)")], WHICH]
CheaperConfig = Annotated[
    Annotated[CheaperReadyConfig, Tag("(pretrained)")] | Annotated[CheaperServedConfig, Tag("(url)")],
    Discriminator(
        _kind, custom_error_type="model", custom_error_message="a cheaper teacher has pretrained or url"
    ),
]
