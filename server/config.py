"""The gateway's configuration: one file, environment variables, flags; checked before anything starts."""

import argparse
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from measuring.examples import load_sources
from router.budget import Budget
from router.errors import UnusableInput
from router.gate_names import GATE_NAMES, UNTRAINED_GATE, GateName
from router.ledger import LedgerConfig, Limit, MemoryLedgerConfig
from router.money import PriceList, TokenPrices
from router.problems import meant, problem
from server.sources import TEACHER
from server.teacher_settings import Setting, TeacherSettings, check_names, words
from server.vllm_flags import read_flags, setting_name

ENVIRONMENT_PREFIX = "WHEELS_"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", re.ASCII)


class ConfigError(UnusableInput):
    """The configuration cannot be used; the message is one line for the operator."""


class UsageError(ConfigError):
    """A word of the command line is unknown."""

    exit_status = 2


def _directory(value: Any) -> Path:
    if not isinstance(value, str | Path) or not Path(value).is_dir():
        raise ValueError(f"no such directory: {value}")
    return Path(value)


def _checkpoint(value: Any) -> Path:
    """A directory, or a name on the hub, which `server.hub` replaces by a directory."""
    if isinstance(value, str | Path) and HUB_NAME.fullmatch(str(value)) and not Path(value).exists():
        return Path(value)
    return _directory(value)


def _file(value: Any) -> Path:
    if not isinstance(value, str | Path) or not Path(value).is_file():
        raise ValueError(f"no such file: {value}")
    return Path(value)


def _with_sources(file: Path) -> Path:
    load_sources(file)  # raises a ValueError that names the line
    return file


def _budget(value: Any) -> Any:
    """A budget; a text, as from a flag or a variable, is a fraction or JSON."""
    return _from_json(value, "neither a fraction nor JSON") if isinstance(value, str) else value


def _structure(value: Any) -> Any:
    """A structured value; a text, as from a flag or a variable, is JSON."""
    return _from_json(value, "not JSON") if isinstance(value, str) else value


class _NamedTwice(ValueError):
    """A JSON object has two entries of the same name."""


def _from_json(text: str, problem: str) -> Any:
    """The value of a JSON text. Raises ValueError if it is not JSON (the ``problem``) or has a name twice."""
    try:
        return json.loads(text, object_pairs_hook=_entries)
    except _NamedTwice:
        raise
    except ValueError as error:
        raise ValueError(f"{problem}: {text!r}") from error


def _entries(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise _NamedTwice(f"two entries named {name!r}")
        entries[name] = value
    return entries


def _vllm_settings(value: Any) -> Any:
    value = _structure(value)
    if not isinstance(value, dict):
        raise ValueError("expected a mapping from flags of vLLM's server to values")
    if len({setting_name(str(name)) for name in value}) < len(value):
        raise ValueError("a setting is given twice, in two spellings")
    return value


def _teacher(value: Any) -> Any:
    """The teachers; a text, as from a flag or a variable, is addresses, or JSON by name."""
    value = words(value)
    return _structure(value) if isinstance(value, str) and value.lstrip().startswith("{") else value


Checkpoint = Annotated[Path, BeforeValidator(_checkpoint)]
File = Annotated[Path, BeforeValidator(_file)]
BudgetSetting = Annotated[Budget, BeforeValidator(_budget)]


class ServeConfig(BaseModel):
    """Settings of `wheels serve`. Flags override variables (WHEELS_PORT, …), variables override the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    student: Checkpoint = Field(
        description="student checkpoint, a Hugging Face directory or hub name: OWNER/NAME[@REVISION]"
    )
    teacher: Annotated[Setting, BeforeValidator(_teacher)] = Field(
        description="base URL of the teacher's vLLM server, with or without /v1; separate replicas with "
        "commas; for several teachers, NAME=URL for each (see docs/budgets.md)"
    )
    router: Checkpoint | None = Field(
        None,
        description="router checkpoint, a directory or hub name; the directory may be empty until a router "
        "appears in it; default: the one merged into the student",
    )
    teacher_model: str | None = Field(
        None, description="model name at the teacher's server; default: the first one that it serves"
    )
    teacher_vocabulary: Literal["auto", "same", "other"] = Field(
        "auto",
        description="same: as the student's; other: the models exchange text, not token ids; auto: compare "
        "the vocabularies at startup",
    )
    teacher_api_key: SecretStr | None = Field(None, description="sent to the teacher as a bearer token")
    served_model_name: str = Field("wheels", description="model name that clients use")
    models: Annotated[dict[str, BudgetSetting], BeforeValidator(_structure)] = Field(
        {}, description="extra model names, each with its teacher_budget, as JSON"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(8000, description="port to listen on")
    default_budget: BudgetSetting = Field(
        Budget(fraction=0.1), description="teacher_budget of requests that set none: a fraction or JSON"
    )
    limits: Annotated[tuple[Limit, ...], BeforeValidator(_structure)] = Field(
        (), description="limits that all requests share, as JSON; see docs/budgets.md"
    )
    prices: Annotated[PriceList | None, BeforeValidator(_structure)] = Field(
        None,
        description="prices of a million student and teacher tokens, as JSON; see docs/budgets.md",
    )
    session_seconds: Annotated[float, Field(ge=60, le=32 * 86400)] = Field(
        3600.0, description="seconds after which an unused session (teacher_session) expires"
    )
    most_sessions: PositiveInt = Field(1000, description="most open sessions for each tenant")
    ledger: Annotated[LedgerConfig, BeforeValidator(_structure)] = Field(
        MemoryLedgerConfig(),
        description="where spending under limits is stored, as JSON: in memory, or in Redis",
    )
    tenants: str | None = Field(
        None, description="file of API keys with their budgets and limits, or its contents"
    )
    metrics_api_key: SecretStr | None = Field(
        None, description="API key for /metrics; with tenants, /metrics needs this key or an admin's"
    )
    gate: GateName | None = Field(
        None,
        description=f"gate that decides when to ask: {', '.join(GATE_NAMES)}; "
        f"default: learned with a router, else {UNTRAINED_GATE}",
    )
    price: FiniteFloat | None = Field(
        None, description="fixed price of a teacher token; default: calibrated or learned while serving"
    )
    aim: Literal["quality", "rate"] = Field(
        "quality", description="quality: use at most a budget's fraction; rate: use all of it"
    )
    span_tokens: PositiveInt | None = Field(
        None,
        description="initial credit of a fraction, in tokens; default: the router's, or 4",
    )
    ask_tokens: PositiveInt | None = Field(
        None, description="tokens that a teacher call asks for; default: the router's, or 1"
    )
    on_teacher_error: Literal["degrade", "error"] = Field(
        "degrade",
        description="if the teacher is lost: the student finishes (degrade), or the answer is a 502 (error)",
    )
    teacher_timeout: PositiveFloat = Field(10.0, description="longest wait for a teacher token, in seconds")
    teacher_wait: float = Field(
        0.0, ge=0, description="how long to wait for the teacher at startup, in seconds"
    )
    span_timeout: PositiveFloat = Field(20.0, description="longest wait for 64 teacher tokens, in seconds")
    teacher_concurrency: PositiveInt = Field(
        1024, description="most concurrent calls to each replica of the teacher"
    )
    teacher_queue: float = Field(
        0.2, ge=0, description="how long a call waits for a busy teacher, in seconds"
    )
    teacher_probe: PositiveFloat = Field(
        2.0, description="time between health checks of each replica, in seconds"
    )
    breaker_failures: PositiveInt = Field(
        3, description="failures in a row that open a replica's circuit breaker"
    )
    breaker_seconds: PositiveFloat = Field(
        5.0, description="how long a circuit breaker stays open, in seconds"
    )
    drain_seconds: float = Field(
        30.0, ge=0, description="how long running requests may continue after SIGTERM, in seconds"
    )
    examples: Annotated[File, AfterValidator(_with_sources)] | None = Field(
        None, description="JSONL file of {source}: example prompts for the playground"
    )
    record: Path | None = Field(
        None,
        description="directory in which to record completions, as token ids, for training a router",
    )
    record_share: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="share of the completions with a budget to record"
    )
    record_megabytes: PositiveInt = Field(
        1000, description="size at which a gateway stops recording, in megabytes"
    )
    cache: Path = Field(
        Path.home() / ".cache" / "training-wheels",
        description="directory for copies of the student with its router, and for learned prices",
    )
    vllm: Annotated[dict[str, Any], BeforeValidator(_vllm_settings)] = Field(
        default_factory=dict, description="vLLM settings for the student, by flag name"
    )

    @field_validator("models")
    @classmethod
    def _are_new_names(cls, models: dict[str, Budget], info: ValidationInfo) -> dict[str, Budget]:
        for name in models:
            if not name or name != name.strip() or name.startswith("-"):
                raise ValueError(
                    f"a model name must not be empty, start with a dash or have outer spaces: {name!r}"
                )
            if name == info.data.get("served_model_name"):
                raise ValueError(f"{name!r} is the served_model_name: set default_budget for it")
        return models

    @field_validator("teacher")
    @classmethod
    def _have_usable_names(cls, teacher: Any) -> Any:
        if isinstance(teacher, dict):
            check_names(teacher)
        return teacher

    @model_validator(mode="after")
    def _money_has_prices(self) -> "ServeConfig":
        if self.prices is None:
            for name, budget in self._budgets.items():
                if budget.in_money:
                    raise ValueError(f"{name}.cost needs prices (--prices)")
            if any(limit.in_money for limit in self.limits):
                raise ValueError("limits: a limit of type cost needs prices (--prices)")
        return self

    @model_validator(mode="after")
    def _settings_of_one_teacher(self) -> "ServeConfig":
        if isinstance(self.teacher, dict):
            for name in ("model", "vocabulary", "api_key"):
                if f"teacher_{name}" in self.model_fields_set:
                    raise ValueError(f"teacher_{name}: with named teachers, set {name} for each of them")
        return self

    @model_validator(mode="after")
    def _teachers_are_known(self) -> "ServeConfig":
        names = self.teachers.keys()
        for setting, budget in self._budgets.items():
            if (stranger := budget.unknown(names)) is not None:
                raise ValueError(f"{setting}.teachers: no teacher is named {stranger!r}")
        for limit in self.limits:
            if limit.teacher not in (None, *names):
                raise ValueError(f"limits: no teacher is named {limit.teacher!r}")
        if self.prices is not None:
            self._check_prices(self.prices)
        return self

    def _check_prices(self, prices: PriceList) -> None:
        if isinstance(prices.teacher, TokenPrices):
            if isinstance(self.teacher, dict):
                raise ValueError("prices.teacher: with named teachers, give prices by name")
            return
        for name in prices.teacher:
            if name not in self.teachers:
                raise ValueError(f"prices.teacher: no teacher is named {name!r}")
        for name, settings in self.teachers.items():
            if settings.tool is None and name not in prices.teacher:
                raise ValueError(f"prices.teacher: no prices for {name}")

    @property
    def _budgets(self) -> dict[str, Budget]:
        named = {"default_budget": self.default_budget}
        return named | {f"models.{name}": budget for name, budget in self.models.items()}

    @property
    def teachers(self) -> dict[str, TeacherSettings]:
        """Settings of all teachers, by name."""
        if isinstance(self.teacher, dict):
            return self.teacher
        only = TeacherSettings(
            url=self.teacher,
            model=self.teacher_model,
            vocabulary=self.teacher_vocabulary,
            api_key=self.teacher_api_key,
        )
        return {TEACHER: only}

    @property
    def model_teachers(self) -> list[str]:
        """Names of the teachers that are models, not tools."""
        return [name for name, settings in self.teachers.items() if settings.tool is None]

    @property
    def vllm_settings(self) -> dict[str, Any]:
        """The setting ``vllm``, by vLLM's own spelling of its flags."""
        return {setting_name(name): value for name, value in self.vllm.items()}


class CommandLine(NamedTuple):
    """The arguments of a command, split at `--`."""

    words: list[str]
    vllm_flags: list[str]
    """Words after a ``--``: flags of vLLM's own server."""

    @classmethod
    def of(cls, argv: list[str]) -> "CommandLine":
        """The two parts of a command's arguments."""
        if "--" not in argv:
            return cls(argv, [])
        place = argv.index("--")
        return cls(argv[:place], argv[place + 1 :])


def load(argv: list[str]) -> ServeConfig:
    """Configuration from the command line; flags of vLLM's own server may follow a ``--``.

    Raises:
        ConfigError: a value is wrong, a key unknown or a file missing; the message names the setting.
    """
    words, vllm_flags = CommandLine.of(argv)
    parser = argparse.ArgumentParser(
        prog="wheels serve",
        description="Serve a student that asks a teacher for tokens, through vLLM's OpenAI-compatible API.",
        epilog="Put flags of the student's vLLM server after --.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_settings(parser)
    return checked(read_settings(vars(parse(parser, words))), vllm_flags)


def parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """The parsed words. Raises UsageError for an unknown one, because many are flags of vLLM's server."""
    options, unknown = parser.parse_known_args(words)
    if unknown:
        word = unknown[0]
        flags = [flag_of(name) for name in ServeConfig.model_fields if name != "vllm"]
        raise UsageError(
            f"unknown argument {word}{meant(word, flags)}; the models are --student and --teacher, and flags "
            "of vLLM's own server come after --"
        )
    return options


def add_settings(parser: argparse._ActionsContainer) -> None:
    """Add a flag for every setting, and one for the configuration file."""
    parser.add_argument("--config", type=Path, help="YAML file with the settings below, by name")
    for name, field in ServeConfig.model_fields.items():
        if name != "vllm":
            action = "append" if name == "teacher" else "store"
            parser.add_argument(
                flag_of(name), action=action, help=(field.description or "") + _default(field)
            )


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"


def _default(field: FieldInfo) -> str:
    """The end of a flag's help: its default, as it would be typed."""
    value = None if field.is_required() else field.default
    if isinstance(value, BaseModel):
        value = json.dumps(value.model_dump(mode="json", exclude_none=True))
    return "" if value in (None, (), {}) else f" (default: {value})"


def read_settings(flags: dict[str, Any]) -> dict[str, Any]:
    """Settings by name, as they were given: flags win over variables, variables over the file.

    Raises:
        ConfigError: the file cannot be read.
    """
    file = flags.pop("config", None)
    return _from_file(file) | _from_environment() | flags


def checked(settings: dict[str, Any], vllm_flags: list[str]) -> ServeConfig:
    """The checked configuration from these settings and these flags of vLLM's server.

    Raises:
        ConfigError: see `load`.
    """
    settings = dict(settings)
    try:
        if vllm_flags:
            settings["vllm"] = _merged(settings.get("vllm", {}), read_flags(vllm_flags))
        return ServeConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError("; ".join(_problem(entry) for entry in error.errors())) from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _merged(settings: Any, flags: dict[str, Any]) -> dict[str, Any]:
    """The file's settings of vLLM and the flags; a flag replaces a setting of the same name."""
    try:
        checked = _vllm_settings(settings)
    except ValueError as error:
        raise ConfigError(f"vllm: {error}") from error
    kept = {name: value for name, value in checked.items() if setting_name(name) not in flags}
    return kept | flags


def _problem(entry: Any) -> str:
    if entry["type"] == "missing" and len(entry["loc"]) == 1:
        name = str(entry["loc"][0])
        return f"{name} is required ({flag_of(name)})"
    return problem(entry, known=ServeConfig.model_fields)


class _YamlLoader(yaml.SafeLoader):
    """A YAML loader that refuses two entries of the same name; YAML's own loader takes the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in names:
                problem = f"two entries named {key.value!r}"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            names.add(name)
        return node


def read_yaml(text: str | bytes) -> Any:
    """The value of a YAML document. Raises YAMLError, also if a mapping has two entries of the same name."""
    return yaml.load(text, _YamlLoader)


def _from_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = read_yaml(path.read_bytes()) or {}
    except (OSError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())  # YAML's errors are drawn over several lines
        raise ConfigError(f"cannot read the configuration file {path}: {problem}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a mapping of setting names to values")
    return content


def _from_environment() -> dict[str, str]:
    return {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for name, value in os.environ.items()
        if name.startswith(ENVIRONMENT_PREFIX)
    }
