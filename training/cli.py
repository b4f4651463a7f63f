"""`wheels train` and `wheels evaluate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers

from router.checkpoint import CheckpointError
from training.config import RecipeError, load_recipe
from training.evaluation.report import METHODS, evaluate_pair, plot, table
from training.loop.dry_run import dry_run
from training.loop.stopping import Stopped
from training.pipeline import STAGES, run, task_of
from training.served import ServerError

STOPPED = 130  # exit status of a run that was asked to stop
RECIPES = Path(__file__).parent / "recipes"


def find_recipe(name: str) -> Path:
    """A path, or the name of a recipe that ships with the project."""
    shipped = RECIPES / f"{name}.yaml"
    return shipped if shipped.exists() else Path(name)


def train(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "wheels train", description="Train what a recipe says; resumes by itself."
    )
    parser.add_argument(
        "recipe", help="a YAML file, or one of: " + ", ".join(p.stem for p in RECIPES.glob("*.yaml"))
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. teacher.schedule.steps=100")
    parser.add_argument("--stage", choices=STAGES, action="append", help="only this stage (repeatable)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print shapes, memory and a time estimate; keep nothing"
    )
    args = parser.parse_intermixed_args(argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        recipe = load_recipe(find_recipe(args.recipe), args.overrides)
        go = dry_run if args.dry_run else run
        go(recipe, tuple(args.stage or STAGES))
    except (RecipeError, ServerError) as error:
        print(error, file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"{stopped}; the same command goes on from there", file=sys.stderr)
        return STOPPED
    return 0


def evaluate(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "wheels evaluate", description="Quality against teacher rate, all gates."
    )
    parser.add_argument("pair", type=Path, help="directory with teacher, student and router")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of the recipe, e.g. task.name=jsonl"
    )
    parser.add_argument("--recipe", default="demo", help="names the task and the longest completion")
    parser.add_argument("--examples", type=int, default=1000, help="of the test split")
    parser.add_argument("--spans", type=int, nargs="*", default=[1, 2, 4], help="span lengths of the curves")
    parser.add_argument(
        "--router", action="append", default=[], metavar="NAME=DIR", help="a further router (repeatable)"
    )
    parser.add_argument("--out", type=Path, help="directory for report.json and plots")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object, last")
    args = parser.parse_intermixed_args(argv)
    try:
        recipe = load_recipe(find_recipe(args.recipe), args.overrides)
        others, task = routers(args.router), task_of(recipe)
        torch.set_num_threads(recipe.threads)
        report = evaluate_pair(
            args.pair, task, task.test()[: args.examples], args.spans, recipe.max_tokens, others
        )
    except (RecipeError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 2
    print(table(report))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "report.json").write_text(report.to_json() + "\n")
        plot(report, args.out)
    if args.json:
        print(report.to_json())
    return 0


def routers(entries: list[str]) -> dict[str, Path]:
    """Directories by name. Raises RecipeError for an entry without one, or with a name that is taken."""
    named = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not (name and equals and path):
            raise RecipeError(f"--router {entry!r}: want NAME=DIR")
        if name in METHODS or name in named:
            raise RecipeError(f"--router {entry!r}: there is a method {name} already")
        named[name] = Path(path)
    return named


COMMANDS = {"train": train, "evaluate": evaluate}


def main(argv: list[str]) -> int:
    command, *rest = argv
    return COMMANDS[command](rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
