"""Records of what a stage was trained from, kept with its checkpoint and its export.

They show whether a recipe has changed since. A record holds the fields of the recipe that matter for the
stage's result. It leaves out how a run is split, logged or compiled.
"""

import json
from pathlib import Path
from typing import Any

from training.config import Recipe
from training.gate_config import WHERE
from training.method_config import GKDConfig, MethodConfig, PCLConfig, SeqKDConfig
from training.model_config import ModelConfig, PrunedConfig, Role, ScratchConfig, ServedConfig

RECORD = "recipe.json"
HOW = (
    "accumulate",
    "compile",
    "gradient_checkpointing",
    "checkpoint_every",
    "log_every",
    "validate_every",
    "validate_examples",
)
"""Fields of a schedule that do not change what is learned."""
WHOLE = ("options", "cheaper_teachers")
"""Fields that are compared as a whole: a missing key counts as a change."""
Record = dict[str, Any]


def model_record(recipe: Recipe, role: Role) -> Record:
    """The record of the teacher or the student."""
    config = recipe.model(role)
    if isinstance(config, ServedConfig):
        return {"kind": "served", "model": config.model, "top_logprobs": config.top_logprobs}
    record = {"kind": _kind(config)} | config.model_dump(mode="json", exclude={"schedule", "rollouts"})
    record |= {"tokenizer": _tokenizer(recipe), "chat": recipe.chat.model_dump(mode="json")}
    plan = config.plan
    if plan is None:
        return _plain(record)
    record["schedule"] = plan.schedule.model_dump(mode="json", exclude=set(HOW))
    record |= {
        "seed": recipe.seed,
        "task": recipe.task.model_dump(mode="json"),
        "max_length": recipe.max_length,
    }
    if _writes(plan.method):
        record["max_tokens"] = recipe.max_tokens
    if role == "student" and (plan.method.needs_teacher or isinstance(config, PrunedConfig)):
        record["teacher"] = model_record(recipe, "teacher")
    return _plain(record)


def router_record(recipe: Recipe) -> Record:
    """The record of the router and of the pair that it is trained for."""
    return _plain(
        {
            "router": recipe.router.model_dump(mode="json", exclude=WHERE),
            "student": model_record(recipe, "student"),
            "teacher": model_record(recipe, "teacher"),
            "cheaper_teachers": _cheaper(recipe),
            "task": recipe.task.model_dump(mode="json"),
            "max_tokens": recipe.max_tokens,
            "seed": recipe.seed,
        }
    )


def tokenizer_record(recipe: Recipe) -> Record:
    """The record of a tokenizer that is trained on the task."""
    return _plain(
        {"tokenizer": _tokenizer(recipe), "task": recipe.task.model_dump(mode="json"), "seed": recipe.seed}
    )


def changes(before: Record, now: Record, path: str = "") -> list[str]:
    """The differences of two records, e.g. `schedule.steps 10, now 20`. Fields of only one are ignored."""
    found: list[str] = []
    for key in before.keys() & now.keys():
        name = f"{path}{key}"
        old = before[key]
        new = now[key]
        if isinstance(old, dict) and isinstance(new, dict) and key not in WHOLE:
            found += changes(old, new, name + ".")
        elif old != new:
            found.append(f"{name} {json.dumps(old)}, now {json.dumps(new)}")
    return sorted(found)


def may_be_prolonged(before: Record, now: Record, step: int) -> bool:
    """Whether the learning rate has not begun to decay at this step, by the old and by the new schedule."""
    return step <= min(_decay_starts(before), _decay_starts(now))


def _decay_starts(record: Record) -> float:
    schedule = record["schedule"]
    return schedule["steps"] * (1 - schedule["decay"])


def without_length(record: Record) -> Record:
    """The record without its schedule's `steps` and `decay`, to compare runs that may be prolonged."""
    schedule = dict(record["schedule"])
    for field in ("steps", "decay"):
        schedule.pop(field, None)
    return record | {"schedule": schedule}


def write_record(record: Record, directory: Path) -> None:
    """Write a record to the directory of what was trained."""
    (directory / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def read_record(directory: Path) -> Record | None:
    """The record in a directory; None if an earlier version trained it without a record."""
    file = directory / RECORD
    return json.loads(file.read_text()) if file.exists() else None


def _kind(config: ModelConfig) -> str:
    if isinstance(config, ScratchConfig):
        return "scratch"
    return "pruned" if isinstance(config, PrunedConfig) else "pretrained"


def _cheaper(recipe: Recipe) -> Record:
    """The records of all cheaper teachers, without their servers' addresses, which do not matter."""
    records = {}
    for name, config in recipe.cheaper:
        records[name] = config.model_dump(mode="json", exclude={"url"})
    return records


def _tokenizer(recipe: Recipe) -> Record:
    if recipe.ready_tokenizer is not None:
        return {"size": None, "pretrained": recipe.ready_tokenizer}
    return recipe.tokenizer.model_dump(mode="json") if recipe.tokenizer else {}


def _writes(method: MethodConfig) -> bool:
    """Whether a method trains on completions of a model, so that `max_tokens` matters."""
    if isinstance(method, GKDConfig | PCLConfig):
        return method.on_policy > 0
    return isinstance(method, SeqKDConfig)


def _plain(record: Record) -> Record:
    """The record as it reads when it comes back from a JSON file."""
    return json.loads(json.dumps(record))
