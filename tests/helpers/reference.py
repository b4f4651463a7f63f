"""The documents of all settings, generated from the code: `python -m tests.helpers.reference` writes them."""

import ast
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from server.config import ServeConfig
from tests.helpers.paths import ROOT
from training import config, gate_config, method_config, model_config, settings
from training.config import Recipe

GENERATED = "<!-- Written by `python -m tests.helpers.reference`; do not edit. -->"
CONFIGURATION = ROOT / "docs" / "configuration.md"
RECIPE = ROOT / "docs" / "recipe.md"
NAMES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    Path: "path",
    NoneType: "null",
    Any: "anything",
}
"""Names of types for a reader of YAML."""


def configuration() -> str:
    """The text of docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        GENERATED,
        "",
        "Every setting of `wheels serve`. You can set all but `vllm` with a flag (`--teacher-timeout 5`),",
        "an environment variable (`WHEELS_TEACHER_TIMEOUT=5`), or a line of the YAML file that `--config`",
        "names. Flags override variables, and variables override the file. An unknown name or a wrong value",
        "stops the start with an error that names it. Put flags of the student's vLLM server after `--`,",
        "or under `vllm:` in the file.",
        "",
        "```yaml",
        "student: deploy/demo/student",
        "router: deploy/demo/router",
        "teacher: [http://teacher-0.internal:8000, http://teacher-1.internal:8000]   # or one address",
        "default_budget: {fraction: 0.1, tokens: 200}",
        "vllm: {max-model-len: 4096, api-key: [old, new], enable-prefix-caching: false}",
        "```",
        "",
        "A list gives a vLLM flag several values. `false` selects its `--no-` form.",
        "",
        "| setting | default | meaning |",
        "| --- | --- | --- |",
    ]
    for name, field in ServeConfig.model_fields.items():
        lines.append(f"| `{name}` | {default_of(field)} | {cell(field.description or '')} |")
    return "\n".join(lines) + "\n"


def recipe() -> str:
    """The text of docs/recipe.md."""
    lines = [
        "# Every field of a recipe",
        "",
        GENERATED,
        "",
        "The fields that `wheels train` reads. [Training](training.md) explains how to use them.",
    ]
    for model in models_of(Recipe):
        lines += ["", f"## {model.__name__}", "", *introduction(model), ""]
        lines += ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
        meanings = docstrings_of(model)
        for name, field in model.model_fields.items():
            kind = type_of(field.annotation)
            meaning = cell(
                field.description or meanings.get(name, "Selects this option." if name == "type" else "")
            )
            lines.append(f"| `{name}` | {kind} | {default_of(field)} | {meaning} |")
    return "\n".join(lines) + "\n"


def introduction(model: type[BaseModel]) -> list[str]:
    """The model's docstring, as lines of the document."""
    return inspect.cleandoc(model.__doc__ or "").splitlines()


def models_of(first: type[BaseModel]) -> list[type[BaseModel]]:
    """A model and all models that its fields contain, each once."""
    found: list[type[BaseModel]] = []
    waiting = [first]
    while waiting:
        model = waiting.pop(0)
        if model in found:
            continue
        found.append(model)
        for field in model.model_fields.values():
            waiting += classes_in(field.annotation)
    return found


def classes_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in an annotation, at any depth."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from classes_in(argument)


def type_of(annotation: Any) -> str:
    """Name of a type for a reader of YAML."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is None:
        if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
            return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
        return NAMES[annotation]
    if origin is typing.Annotated:
        return type_of(arguments[0])
    if origin is typing.Literal:
        return " or ".join(map(str, arguments))
    if origin in (list, tuple):
        return f"list of {type_of(arguments[0])}"
    if origin is dict:
        return f"{type_of(arguments[1])} by name"
    return " or ".join(map(type_of, arguments))


def default_of(field: FieldInfo) -> str:
    """The field's default as a cell of a table, or "required"."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_unset=False) or {}
        value = {key: entry for key, entry in value.items() if entry is not None}
    if value is None or value in ("", {}, (), []):
        return "none"
    text = str(value).replace(str(Path.home()), "~")
    return f"`{text}`"


def cell(text: str) -> str:
    """A text as a cell of a table, in one line."""
    return " ".join(text.split()).replace("|", "\\|")


def docstrings_of(model: type[BaseModel]) -> dict[str, str]:
    """The text below each field of a model, with the fields of its base classes."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        module = inspect.getmodule(cls)
        if module in (config, gate_config, method_config, model_config, settings):
            found |= documented(module, cls.__name__)
    return found


def documented(module: ModuleType, name: str) -> dict[str, str]:
    """The text below each field of one class."""
    found: dict[str, str] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ClassDef) or node.name != name:
            continue
        for statement, after in zip(node.body, node.body[1:], strict=False):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(after, ast.Expr):
                continue
            if isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
                found[statement.target.id] = inspect.cleandoc(after.value.value)
    return found


def main() -> None:
    """Write both documents."""
    CONFIGURATION.write_text(configuration())
    RECIPE.write_text(recipe())


if __name__ == "__main__":
    main()
