"""The recipe: a YAML file with `key=value` overrides, checked when it is read. Unknown keys are refused."""

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from router.budget import TeacherName
from router.errors import UnusableInput
from router.problems import field_names, problems
from training.gate_config import (
    DifferenceObjective,
    GateConfig,
    GatewayRollouts,
    InProcessRollouts,
    PriceConditioning,
    QualityGain,
)
from training.method_config import Schedule
from training.model_config import (
    CheaperConfig,
    ModelConfig,
    PretrainedConfig,
    PrunedConfig,
    Role,
    ScratchConfig,
    ServedConfig,
    StudentConfig,
    TeacherConfig,
)
from training.settings import Frozen, Rate


class RecipeError(UnusableInput):
    """The recipe is missing or malformed, or it sets something impossible; the message names it."""


class TaskConfig(Frozen):
    """The task that the pair is trained for, see `training.tasks`."""

    name: str
    """Name of the task: `numbers`, `jsonl` or `dataset`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The task's own options, such as `directory` and `metric`; see training.md."""


class TokenizerConfig(Frozen):
    """The pair's tokenizer: trained on the task (set `size`), or pretrained (set `pretrained`)."""

    size: PositiveInt | None = None
    """Number of ids in a tokenizer to train. The models add the reserved rows after them."""
    examples: PositiveInt = 20_000
    """Number of training examples that the merges are learned on."""
    pretrained: str | None = None
    """Directory or hub name (OWNER/NAME, or OWNER/NAME@REVISION) of a pretrained tokenizer."""

    @model_validator(mode="after")
    def _exclusive(self) -> Self:
        if (self.size is None) == (self.pretrained is None):
            raise ValueError("tokenizer: set size or pretrained")
        return self


class ChatConfig(Frozen):
    """How a pretrained tokenizer renders the source as a user message; exported with the student."""

    template: str | None = None
    """Jinja template instead of the tokenizer's own; required if the tokenizer has none."""
    options: dict[str, bool | int | str] = Field(default_factory=dict)
    """Variables fixed in the template, e.g. `enable_thinking: false`."""


class TurnsConfig(Frozen):
    """Turns of training student and gate after the router stage, as long as validation improves."""

    most: PositiveInt = 3
    """Largest number of turns. Each trains the student by `joint`, and then a router for it."""
    rates: tuple[Rate, ...] = (0.05, 0.1, 0.2, 0.3)
    """Fractions to train for, as in method `joint`."""
    temperature: PositiveFloat = 0.2
    """Temperature of asking, as in method `joint`."""
    anchor: float = Field(default=0.1, ge=0)
    """Weight of distillation at every position, as in method `joint`."""
    schedule: Schedule
    """Schedule of the student in each turn."""


class Recipe(Frozen):
    """The whole recipe: all stages of one pair."""

    output: Path
    """Directory for the exported teacher, student and router."""
    work: Path
    """Directory for checkpoints and logs; a second run with the same recipe resumes from there."""
    seed: int = 0
    """Seed of all random numbers."""
    threads: PositiveInt = 1
    """Number of CPU threads that torch uses."""
    max_tokens: PositiveInt = 64
    """Longest completion in rollouts, calibration and evaluation, in tokens."""
    max_length: PositiveInt | None = None
    """Longest example in tokens, prompt and answer together; longer ones are left out. None: the model's
    context.
    """
    teacher_cache: NonNegativeInt = 1024
    """Megabytes of teacher answers to keep in `work` for later epochs; 0: none."""
    task: TaskConfig
    """The task that the pair is trained for."""
    tokenizer: TokenizerConfig | None = None
    """Tokenizer of the pair; None: the pretrained student's, or else the pretrained teacher's."""
    chat: ChatConfig = ChatConfig()
    """How messages become a prompt."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where training metrics go, in addition to `log.jsonl`."""
    teacher: TeacherConfig
    """The large model: trained from scratch, pretrained, trained further, or behind a URL."""
    cheaper_teachers: dict[TeacherName, CheaperConfig] = Field(default_factory=dict, max_length=7)
    """More teachers by name, which the gate may ask instead of `teacher`. `teacher` judges what they write.
    The student does not learn from them. Give them these names in `wheels serve`, next to `teacher`.
    """
    student: StudentConfig
    """The small model: trained from scratch, pretrained, trained further, or a part of the teacher."""
    router: GateConfig
    """The gate, and how its prices are measured."""
    turns: TurnsConfig | None = None
    """Turns of training student and gate after all stages; None: no turns."""

    def model(self, role: Role) -> ModelConfig | ServedConfig:
        """The configuration of teacher or student."""
        return self.teacher if role == "teacher" else self.student

    @property
    def ready_tokenizer(self) -> str | None:
        """Directory or hub name of the pretrained tokenizer; None if the recipe trains one."""
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
        """Name and configuration of each cheaper teacher, from the cheapest to the dearest."""
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
    """Read a recipe and check it.

    Args:
        path: the YAML file.
        overrides: e.g. `teacher.schedule.steps=10`; their values are read as YAML.

    Raises:
        RecipeError: the recipe cannot be used; the message is one line.
    """
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
        where = f"{path} with the overrides" if overrides else path
        raise RecipeError(f"{where}: {problems(error, data, field_names(Recipe))}") from error


def _override(data: dict[str, Any], override: str) -> None:
    """Apply one `key=value` to `data`. The key may have dots; the value null deletes the field."""
    key, equals, value = override.partition("=")
    if not equals:
        raise RecipeError(f"override {override!r}: expected key=value")
    *parents, last = key.split(".")
    place = data
    for parent in parents:
        inner = place.get(parent, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"override {override!r}: {parent} is a plain value without fields")
        place[parent] = dict(inner)  # a copy, because a YAML alias may share it with another place
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
    """The value of a YAML text. Raises ValueError, with a message of one line, if it cannot be read."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error
