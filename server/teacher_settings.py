"""Teachers in the configuration: one by its address, or several by name."""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AnyHttpUrl,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    SecretStr,
    Tag,
    model_validator,
)

from router.budget import TeacherName
from server.sources import STUDENT, TEACHER

NAMED = re.compile(r"([A-Za-z0-9._-]{1,64})=(.*)", re.DOTALL)
"""Matches a word of the command line with a name and an address."""
MOST_MODELS = 8
"""Most teachers that are models. The student asks for each of them by a row of its vocabulary."""


def several(value: Any) -> Any:
    """One or several values as a list; a text has commas between them. Raises ValueError for a repetition."""
    values = (
        value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    )
    values = [entry.strip() if isinstance(entry, str) else entry for entry in values]
    for entry in values:
        if isinstance(entry, str) and "://" not in entry:
            raise ValueError(f"{entry!r} is no URL; expected one like http://{entry}")
    if len(set(map(str, values))) < len(values):
        raise ValueError("a value is given twice")
    return values


Addresses = Annotated[tuple[AnyHttpUrl, ...], BeforeValidator(several), Field(min_length=1)]


class TeacherSettings(BaseModel):
    """One of several teachers: a model at its replicas, or a tool."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: Addresses | None = None
    """Base URLs of the teacher's replicas, with or without /v1."""
    tool: Addresses | None = None
    """URLs of a tool's replicas, an HTTP function that is called in place of a model at ``url``."""
    model: str | None = None
    """Model name at the teacher's server; default: the first one that it serves."""
    vocabulary: Literal["auto", "same", "other"] = "auto"
    api_key: SecretStr | None = None
    """API key that is sent as a bearer token."""
    timeout: PositiveFloat | None = None
    """Longest wait for a token, in seconds; default: ``teacher_timeout``."""

    @model_validator(mode="before")
    @classmethod
    def _address_is_url(cls, value: Any) -> Any:
        return value if isinstance(value, dict | TeacherSettings) else {"url": value}

    @model_validator(mode="after")
    def _is_one_kind(self) -> "TeacherSettings":
        if (self.url is None) == (self.tool is None):
            raise ValueError("set either url or tool")
        if self.tool is not None and (self.model is not None or self.vocabulary != "auto"):
            raise ValueError("a tool cannot have a model or a vocabulary")
        return self


def words(value: Any) -> Any:
    """The teachers from one or several words of the flag: addresses, NAME=ADDRESS, or NAME=JSON."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        return value
    if not any(map(NAMED.match, value)):
        return ",".join(value)
    named: dict[str, Any] = {}
    for word in value:
        match = NAMED.match(word)
        name, address = (TEACHER, word) if match is None else match.groups()
        if name in named:
            raise ValueError(f"two teachers are named {name!r}")
        named[name] = _described(name, address)
    return named


def _described(name: str, text: str) -> Any:
    """A teacher's address, or its settings if the text is JSON."""
    if not text.startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name}: not JSON: {text!r}") from error


def _kind(value: Any) -> str:
    return "(named)" if isinstance(value, dict) else "(addresses)"


Named = dict[TeacherName, TeacherSettings]
Setting = Annotated[
    Annotated[Addresses, Tag("(addresses)")] | Annotated[Named, Field(min_length=1), Tag("(named)")],
    Discriminator(_kind),
]
"""The replicas of one teacher, or teachers by name."""


def check_names(named: Named) -> None:
    """Raises ValueError if a teacher is named like the student, or if too many teachers are models."""
    if STUDENT in named:
        raise ValueError(f"a teacher cannot be named {STUDENT!r}")
    models = [name for name, settings in named.items() if settings.tool is None]
    if len(models) > MOST_MODELS:
        raise ValueError(f"at most {MOST_MODELS} teachers can be models, but {len(models)} are")
