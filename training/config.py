"""The recipe: one YAML file and `key=value` overrides; frozen, checked when built, unknown keys refused."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import yaml
from pydantic import (
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    model_validator,
)

from router.budget import TeacherName
from router.errors import UnusableInput
from router.problems import problems
from training.gate_config import (
    DifferenceObjective,
    GateConfig,
    GatewayRollouts,
    InProcessRollouts,
    PriceConditioning,
    QualityGain,
)
from training.settings import BudgetPrompt, Frozen, Rate

Role = Literal["teacher", "student"]
ROLES: tuple[Role, ...] = ("teacher", "student")


class RecipeError(UnusableInput):
    """The recipe is missing, malformed, or sets something that does not exist; the message names it."""


class TaskConfig(Frozen):
    """What the pair is trained for, see `training.tasks`."""

    name: str
    """`numbers`, `jsonl` or `dataset`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The task's own options, such as `directory` and `metric`; see training.md."""


class TokenizerConfig(Frozen):
    """Trained on the task (`size`), or a ready one (`pretrained`)."""

    size: PositiveInt | None = None
    """Ids that the tokenizer knows; the models add the reserved rows after them."""
    examples: PositiveInt = 20_000
    """Training examples that the merges are learned on."""
    pretrained: str | None = None
    """Directory, or hub name: OWNER/NAME, or OWNER/NAME@REVISION."""

    @model_validator(mode="after")
    def _exclusive(self) -> Self:
        if (self.size is None) == (self.pretrained is None):
            raise ValueError("tokenizer: set size or pretrained")
        return self


class ChatConfig(Frozen):
    """How a ready tokenizer renders the source as a user's message; exported with the student."""

    template: str | None = None
    """Jinja template in place of the tokenizer's own; needed where that has none."""
    options: dict[str, bool | int | str] = Field(default_factory=dict)
    """Variables fixed in the template, e.g. `enable_thinking: false`."""


class Shape(Frozen):
    """A Llama of this size, trained from scratch."""

    hidden: PositiveInt
    """Width of the hidden state."""
    layers: PositiveInt
    """Number of layers."""
    heads: PositiveInt
    """Attention heads of a layer."""
    feed_forward: PositiveInt
    """Width inside a layer's feed-forward part."""
    head_dim: PositiveInt = 32
    """32 is the least that vLLM's CPU attention takes."""
    context: PositiveInt = 512
    """Longest text, in tokens."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of the embeddings and of what each block adds, while training: for little data."""


class Schedule(Frozen):
    """Warm-up, constant, then linear decay to zero (WSD), so that a run can be prolonged before its decay."""

    steps: PositiveInt
    """Optimizer steps."""
    batch: PositiveInt
    """Examples of one optimizer step, over all processes."""
    accumulate: PositiveInt = 1
    """Passes that a process splits its share of the batch into: less memory, the same gradient."""
    learning_rate: PositiveFloat
    """The rate after the warm-up and before the decay."""
    warmup: NonNegativeInt = 100
    """Steps until the full learning rate."""
    decay: Rate = 0.5
    """Share of the steps that decay."""
    weight_decay: float = 0.0
    """The optimizer's weight decay."""
    clip: PositiveFloat = 1.0
    """Largest norm of the gradient; a larger one is scaled down to it."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """muon is for models that are trained in whole, adamw for adapters."""
    compile: bool = True
    """Compile the decoder: nearly twice as fast for small models on a CPU, after half a minute."""
    gradient_checkpointing: bool = False
    """Compute the activations inside a layer again in the backward pass: less memory, a third more time."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products under autocast, where there are instructions for it (not on a CPU of AVX2 alone);
    weights and optimizer stay float32.
    """
    checkpoint_every: PositiveInt = 250
    """Steps between two checkpoints."""
    log_every: PositiveInt = 25
    """Steps between two lines of the log."""
    validate_every: NonNegativeInt = 0
    """Steps between greedy completions of validation examples, scored by the task; 0: never."""
    validate_examples: PositiveInt = 100
    """Validation examples that are completed each time."""
    keep: Literal["last", "best"] = "last"
    """Which weights are exported: those of the last step, or of the best validation."""
    patience: NonNegativeInt = 0
    """Validations without a better one after which training ends; 0: it goes on to the last step."""

    @model_validator(mode="after")
    def _validated(self) -> Self:
        if not self.validate_every and (self.keep == "best" or self.patience):
            raise ValueError("keep: best and patience need validate_every")
        return self


class MethodBase(Frozen):
    """What all methods tell about themselves."""

    needs_teacher: ClassVar[bool] = True
    teacher_in_process: ClassVar[bool] = False
    """Whether a teacher behind a URL is not enough."""

    @property
    def needs_references(self) -> bool:
        """Whether it trains on right answers of the task."""
        return True


class SupervisedConfig(MethodBase):
    """Fine-tuning on whole answers, whoever wrote them."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the mass that goes to all tokens alike: a teacher on little data stays less sure of itself."""


class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning on the references."""

    needs_teacher: ClassVar[bool] = False
    type: Literal["sft"]


class SeqKDConfig(SupervisedConfig):
    """Sequence-level distillation: fine-tuning on the teacher's own completions."""

    teacher_in_process: ClassVar[bool] = True
    type: Literal["seqkd"]
    temperature: float = Field(default=0.0, ge=0)
    """0: greedy, the likeliest completion; 1: drawn from the teacher."""

    @property
    def needs_references(self) -> bool:
        """It trains on what the teacher writes."""
        return False


class KDConfig(MethodBase):
    """Word-level distillation: forward KL to the teacher on the references' prefixes."""

    type: Literal["kd"]
    temperature: PositiveFloat = 1.0
    """Of both distributions: above 1 the teacher's less likely tokens count more. The loss is multiplied by
    its square, so that gradients keep their size.
    """


class GKDConfig(MethodBase):
    """Generalised Jensen-Shannon divergence, on the student's own completions."""

    type: Literal["gkd"]
    beta: float = Field(default=1.0, ge=0, le=1)
    """0: forward KL, 1: reverse KL."""
    temperature: PositiveFloat = 1.0
    """Of both distributions, as with `kd`; completions are drawn at 1."""
    on_policy: float = Field(default=0.5, ge=0, le=1)
    """Share of the steps on the student's own completions; the others are on the references."""

    @property
    def needs_references(self) -> bool:
        """Only for the steps on references."""
        return self.on_policy < 1


class PCLConfig(MethodBase):
    """Path consistency with V = 0: squared log-ratios, on own completions and references."""

    type: Literal["pcl"]
    window: NonNegativeInt = 0
    """Decisions of a sub-path; 0: one step, all actions."""
    clip: PositiveFloat = 4.0
    """Residuals count linearly beyond this, nats."""
    on_policy: float = Field(default=0.5, ge=0, le=1)
    """Share of each step's rows that hold the student's own completions; the others hold references."""

    @property
    def needs_references(self) -> bool:
        """Only for the rows of references."""
        return self.on_policy < 1


class JointConfig(MethodBase):
    """A student goes on with its router: distillation where the gate does not ask.

    See `training.methods.joint`. The router's stage then fits the gate to the new student.
    """

    teacher_in_process: ClassVar[bool] = True
    type: Literal["joint"]
    router: Path
    """Checkpoint that was trained with the student."""
    rates: tuple[Rate, ...] = (0.05, 0.1, 0.2, 0.3)
    """Budgets that rows are trained for, by their calibrated prices."""
    temperature: PositiveFloat = 0.2
    """Of asking, in the gate's units."""
    anchor: float = Field(default=0.1, ge=0)
    """Weight of the distillation that is everywhere."""
    budget_prompt: BudgetPrompt | None = None
    """The budget in words too, for a router of `conditioning: prompt`."""


MethodConfig = Annotated[
    SFTConfig | SeqKDConfig | KDConfig | GKDConfig | PCLConfig | JointConfig, Field(discriminator="type")
]


class TrainingPlan(NamedTuple):
    """How a model is trained."""

    method: MethodConfig
    schedule: Schedule


class TurnsConfig(Frozen):
    """Student and gate in turns after the router's stage, as long as validation gets better."""

    most: PositiveInt = 3
    """Turns at most; each trains the student by `joint` and then a router for it."""
    rates: tuple[Rate, ...] = (0.05, 0.1, 0.2, 0.3)
    """As of method `joint`."""
    temperature: PositiveFloat = 0.2
    """As of method `joint`."""
    anchor: float = Field(default=0.1, ge=0)
    """As of method `joint`."""
    schedule: Schedule
    """Of the student in each turn."""


class RolloutConfig(Frozen):
    """The model's own completions are written by a vLLM server of it; see `training.rollout_server`."""

    url: str
    """Address of the vLLM server, without /v1."""
    directory: Path | None = None
    """Where the weights are handed over, readable by both; None: `rollouts` in the model's work directory."""
    every: PositiveInt = 1
    """Batches drawn between two transfers of weights."""


class ScratchConfig(Frozen):
    """A model trained from nothing."""

    is_ready: ClassVar[bool] = False
    dtype: ClassVar[str] = "float32"
    shape: Shape
    """Its size."""
    method: MethodConfig
    """How it learns."""
    schedule: Schedule
    """How long, and with which optimizer."""
    rollouts: RolloutConfig | None = None
    """A vLLM server that writes its own completions; None: the trainer does."""

    @property
    def plan(self) -> TrainingPlan:
        """How it is trained."""
        return TrainingPlan(self.method, self.schedule)


class LoraConfig(Frozen):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) are trained instead of the weights."""

    rank: PositiveInt = 16
    """Rank of each adapter."""
    alpha: PositiveFloat = 32
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the adapters' inputs, while training."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the modules that get an adapter; by default all linear ones but the output matrix."""


class PretrainedConfig(Frozen):
    """A ready model; trained further where it has a method and a schedule, else taken as it is."""

    pretrained: str
    """Directory, or hub name: OWNER/NAME, or OWNER/NAME@REVISION."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights; keep float32 for what is trained."""
    lora: LoraConfig | None = None
    """Adapters that are trained instead of the weights; None: all weights are."""
    method: MethodConfig | None = None
    """How it is trained further; None: it is taken as it is."""
    schedule: Schedule | None = None
    """How long, and with which optimizer; goes with `method`."""
    rollouts: RolloutConfig | None = None
    """A vLLM server that writes its own completions; None: the trainer does."""

    @property
    def is_ready(self) -> bool:
        """Whether the model is taken as it is."""
        return self.plan is None

    @property
    def plan(self) -> TrainingPlan | None:
        """How it is trained; None: not at all."""
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
    """Which part of the teacher a student begins with."""

    layers: PositiveInt
    """How many of its layers: the first, the last, and others evenly spaced between them."""


class PrunedConfig(Frozen):
    """A student that begins as the trained teacher with a few of its layers, see `training.pruning`."""

    is_ready: ClassVar[bool] = False
    prune: PruneConfig
    """How much of the teacher it keeps."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights."""
    method: MethodConfig
    """How it learns."""
    schedule: Schedule
    """How long, and with which optimizer."""
    rollouts: RolloutConfig | None = None
    """A vLLM server that writes its own completions; None: the trainer does."""

    @property
    def plan(self) -> TrainingPlan:
        """How it is trained."""
        return TrainingPlan(self.method, self.schedule)


class ServedConfig(Frozen):
    """A teacher behind a vLLM server's URL."""

    is_ready: ClassVar[bool] = False
    method: ClassVar[None] = None
    plan: ClassVar[None] = None
    url: str
    """Address of the vLLM server, without /v1."""
    model: str | None = None
    """The name it is served by; None: the only one there."""
    top_logprobs: int = Field(default=20, ge=2)
    """Likeliest tokens asked for at every position (the server's `--max-logprobs` bounds it); all others
    count as one event."""

    @property
    def known_as(self) -> str:
        """What its answers are kept under."""
        return self.url.rstrip("/")


class CheaperReadyConfig(Frozen):
    """A cheaper teacher in process, taken as it is."""

    cost: float = Field(gt=0, le=1)
    """Of its token, if one of `teacher` costs 1: its price is the common one times this."""
    pretrained: str
    """Directory, or hub name: OWNER/NAME, or OWNER/NAME@REVISION."""


class CheaperServedConfig(ServedConfig):
    """A cheaper teacher behind a vLLM server's URL."""

    cost: float = Field(gt=0, le=1)
    """Of its token, if one of `teacher` costs 1: its price is the common one times this."""


def _kind(value: Any) -> str | None:
    keys = value.keys() if isinstance(value, dict) else value.__dict__.keys()
    for kind in ("shape", "pretrained", "prune", "url"):
        if kind in keys:
            return kind
    return None


Scratch = Annotated[ScratchConfig, Tag("shape")]
Pretrained = Annotated[PretrainedConfig, Tag("pretrained")]
Pruned = Annotated[PrunedConfig, Tag("prune")]
WHICH = Discriminator(
    _kind,
    custom_error_type="model",
    custom_error_message="a model has shape, pretrained, (student) prune or (teacher) url",
)
ModelConfig = ScratchConfig | PretrainedConfig | PrunedConfig
StudentConfig = Annotated[Scratch | Pretrained | Pruned, WHICH]
TeacherConfig = Annotated[Scratch | Pretrained | Annotated[ServedConfig, Tag("url")], WHICH]
CheaperConfig = Annotated[
    Annotated[CheaperReadyConfig, Tag("pretrained")] | Annotated[CheaperServedConfig, Tag("url")],
    Discriminator(
        _kind, custom_error_type="model", custom_error_message="a cheaper teacher has pretrained or url"
    ),
]


class Recipe(Frozen):
    """All stages of one pair."""

    output: Path
    """Where teacher, student and router are exported to."""
    work: Path
    """Checkpoints and logs; a second run with the same recipe goes on where the first one ended."""
    seed: int = 0
    """Of everything that is drawn at random."""
    threads: PositiveInt = 1
    """Threads of a CPU that torch computes with."""
    max_tokens: PositiveInt = 64
    """Longest completion in rollouts, calibration and evaluation."""
    max_length: PositiveInt | None = None
    """Tokens of prompt and answer together; longer examples are not trained on. None: the model's context."""
    teacher_cache: NonNegativeInt = 1024
    """Megabytes of the teacher's answers that are kept in `work`, for later epochs; 0: none."""
    task: TaskConfig
    """What the pair is trained for."""
    tokenizer: TokenizerConfig | None = None
    """None: the pretrained student's, or else the pretrained teacher's."""
    chat: ChatConfig = ChatConfig()
    """How a prompt is made of messages."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where the scalars of training go, besides `log.jsonl`."""
    teacher: TeacherConfig
    """The large model: trained from nothing, ready, trained further, or behind a URL."""
    cheaper_teachers: dict[TeacherName, CheaperConfig] = Field(default_factory=dict, max_length=7)
    """Further teachers by name, which the gate may ask in place of `teacher`, who judges them. The student
    does not learn from them. `wheels serve` gets all of them by these names, and `teacher` by its own.
    """
    student: StudentConfig
    """The small model: trained from nothing, ready, trained further, or a part of the teacher."""
    router: GateConfig
    """The gate, and how its prices are measured."""
    turns: TurnsConfig | None = None
    """Student and gate in turns after that; None: each once."""

    def model(self, role: Role) -> ModelConfig | ServedConfig:
        """The configuration of teacher or student."""
        return self.teacher if role == "teacher" else self.student

    @property
    def ready_tokenizer(self) -> str | None:
        """Directory or hub name; None where one is trained."""
        if self.tokenizer is not None:
            return self.tokenizer.pretrained
        for config in (self.student, self.teacher):
            if isinstance(config, PretrainedConfig):
                return config.pretrained
        return None

    @model_validator(mode="after")
    def _prunable(self) -> Self:
        if isinstance(self.student, PrunedConfig) and isinstance(self.teacher, ServedConfig):
            raise ValueError(
                "student.prune: the layers of a teacher behind a URL are not known here; give the teacher's "
                "directory or hub name as teacher.pretrained, or a ready student as student.pretrained"
            )
        return self

    @property
    def cheaper(self) -> list[tuple[str, CheaperConfig]]:
        """The further teachers, from the cheapest to the dearest."""
        return sorted(self.cheaper_teachers.items(), key=lambda named: named[1].cost)

    @model_validator(mode="after")
    def _several_teachers(self) -> Self:
        if not self.cheaper_teachers:
            return self
        for name in ("student", "teacher"):
            if name in self.cheaper_teachers:
                raise ValueError(f"cheaper_teachers.{name}: another model has this name")
        router = self.router
        is_started = isinstance(router.rollouts, GatewayRollouts) and router.rollouts.is_started
        refused = {
            f"router.objective {router.objective.type}": not isinstance(
                router.objective, DifferenceObjective
            ),
            "router.gain quality": isinstance(router.gain, QualityGain),
            "router.conditioning prompt": not isinstance(router.conditioning, PriceConditioning),
            "turns": self.turns is not None,
            "router.rollouts gateway without a url": is_started,
        }
        for name, is_set in refused.items():
            if is_set:
                raise ValueError(f"{name}: not possible with several teachers (cheaper_teachers)")
        for name, config in self.cheaper:
            if isinstance(config, ServedConfig) and isinstance(router.rollouts, InProcessRollouts):
                raise ValueError(
                    f"cheaper_teachers.{name}.url: router.rollouts in_process needs the teacher in process"
                )
        return self

    @model_validator(mode="after")
    def _started(self) -> Self:
        rollouts = self.router.rollouts
        flags = isinstance(rollouts, GatewayRollouts) and rollouts.teacher_flags
        if flags and isinstance(self.teacher, ServedConfig):
            raise ValueError(
                "router.rollouts.teacher_flags: no effect, because a teacher behind a URL is not started here"
            )
        return self

    @model_validator(mode="after")
    def _in_turns(self) -> Self:
        if self.turns is None:
            return self
        if isinstance(self.teacher, ServedConfig):
            raise ValueError("turns: method joint needs the teacher in process, not behind a URL")
        if not isinstance(self.router.rollouts, InProcessRollouts):
            raise ValueError(f"turns: need rollouts in_process, not {self.router.rollouts.type}")
        return self

    @model_validator(mode="after")
    def _vocabulary(self) -> Self:
        if self.tokenizer is None and self.ready_tokenizer is None:
            raise ValueError("tokenizer: set size or pretrained")
        trained = self.tokenizer is not None and self.tokenizer.size is not None
        ready = isinstance(self.student, PretrainedConfig) or bool(self.cheaper_teachers)
        if trained and (ready or not isinstance(self.teacher, ScratchConfig)):
            raise ValueError("tokenizer.size: a pretrained model brings its own tokenizer")
        return self


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """`overrides`: `teacher.schedule.steps=10`; values are read as YAML. Raises RecipeError, in one line."""
    try:
        data = _yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: expected keys and values, as in the shipped recipes")
    for override in overrides or []:
        _override(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{path}: {problems(error)}") from error


def _override(data: dict[str, Any], override: str) -> None:
    """Set one `key=value`, whose key may have dots; null takes away what the recipe says."""
    key, equals, value = override.partition("=")
    if not equals:
        raise RecipeError(f"override {override!r}: expected key=value")
    *parents, last = key.split(".")
    place = data
    for parent in parents:
        inner = place.get(parent, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"override {override!r}: {parent} is a plain value without fields")
        place[parent] = dict(inner)  # an alias of YAML shares it with another place
        place = place[parent]
    try:
        read = _yaml(value)
    except ValueError as error:
        raise RecipeError(f"override {override!r}: {error}") from error
    if read is None:
        place.pop(last, None)
    else:
        place[last] = read


def _yaml(text: str) -> Any:
    """Raises ValueError, in one line."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error
