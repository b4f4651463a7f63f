"""Recipes of a small version of the demo's task, for an existing pair."""

from pathlib import Path
from typing import Any

import yaml

SCHEDULE = {
    "steps": 6,
    "batch": 2,
    "learning_rate": 0.01,
    "checkpoint_every": 2,
    "log_every": 1,
    "compile": False,
}
ROUTER = {
    "span_tokens": 2,
    "ask_tokens": 1,
    "gain": {"type": "regret"},
    "prompts": 8,
    "rounds": 1,
    "epochs": 1,
    "calibration_examples": 4,
    "budgets": [0.2, 0.5],
}


def write_recipe(directory: Path, pair: Path, **fields: Any) -> str:
    """Write a recipe into `directory`, with its output and work there too; returns its path.

    Args:
        directory: directory of the recipe; it may be empty.
        pair: directory with `teacher` and `student`, which are used as they are.
        fields: fields of the recipe that replace the ones set here.
    """
    recipe = {
        "output": f"{directory}/out",
        "work": f"{directory}/work",
        "max_tokens": 8,
        "task": {"name": "numbers"},
        "teacher": {"pretrained": f"{pair}/teacher"},
        "student": {"pretrained": f"{pair}/student"},
        "router": ROUTER,
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | fields))
    return str(path)
