"""The commands `wheels train` and `wheels evaluate`."""

import argparse
import os
from collections.abc import Collection, Sequence
from itertools import chain
from pathlib import Path

import torch
import transformers
from huggingface_hub import HfApi

from router.checkpoint import RouterCheckpoint
from training.config import Recipe, RecipeError, load_recipe
from training.dry_run import dry_run
from training.evaluation.gateway import BUDGETS, measure
from training.evaluation.in_process import evaluate_pair
from training.evaluation.plots import plot
from training.evaluation.report import (
    GATEWAY,
    METHODS,
    QualityReport,
    gateway_report,
    joined,
    table,
)
from training.hub import check_hub, push
from training.pipeline import run, task_of
from training.running_gateway import RunningGateway
from training.turns import take_turns, turns_of
from training.workspace import STAGES, Stage

TURNS = "turns"
SPANS = (1, 2, 4)
"""Lengths of teacher calls that a pair is measured with, in tokens, unless `--spans` sets others."""
RECIPES = Path(__file__).parent / "recipes"


def find_recipe(name: str) -> Path:
    """The path of a recipe, given as a path or as the name of a recipe that ships with the project.

    Raises:
        RecipeError: there is none.
    """
    shipped = RECIPES / f"{name}.yaml"
    path = shipped if shipped.exists() else Path(name)
    if not path.exists():
        raise RecipeError(f"no recipe {name}: expected a YAML file, or one of {shipped_recipes()}")
    return path


def shipped_recipes() -> str:
    """Names of the recipes that ship with the project, separated by commas."""
    return ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))


def training_parser() -> argparse.ArgumentParser:
    """The parser of the arguments of `wheels train`."""
    parser = argparse.ArgumentParser(
        "wheels train",
        description="Train a pair from a recipe. Repeat the command to resume an interrupted run.",
    )
    parser.add_argument("recipe", help=f"a YAML file, or one of: {shipped_recipes()}")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="override a field of the recipe, e.g. teacher.schedule.steps=100",
    )
    parser.add_argument(
        "--stage", choices=(*STAGES, TURNS), action="append", help="run only this stage (repeatable)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print shapes, memory and a time estimate; keep nothing"
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="discard earlier results of the stages (those of --stage, or all) and start again",
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="at the end, upload to OWNER/NAME-student and OWNER/NAME-router (private if they are new)",
    )
    return parser


def train(argv: list[str]) -> int:
    """Run `wheels train`.

    Raises:
        WheelsError: the recipe, or something that it names, cannot be used; or the training failed or was
            stopped.
    """
    parser = training_parser()
    args = parser.parse_intermixed_args(argv)
    if args.dry_run and (args.restart or args.push_to_hub):
        parser.error("--dry-run keeps nothing: leave out --restart and --push-to-hub")
    if args.dry_run and args.stage == [TURNS]:
        parser.error("--dry-run: a turn takes what the stages student and router take")
    transformers.utils.logging.disable_progress_bar()
    recipe = load_recipe(find_recipe(args.recipe), args.overrides)
    wanted = args.stage or [*STAGES, *([TURNS] if recipe.turns is not None else [])]
    if TURNS in wanted:
        turns_of(recipe)  # refuses before anything is trained
    stages = tuple(stage for stage in STAGES if stage in wanted)
    if args.dry_run:
        dry_run(recipe, stages)
    else:
        train_and_push(recipe, stages, TURNS in wanted, args.restart, args.push_to_hub)
    return 0


def train_and_push(
    recipe: Recipe, stages: tuple[Stage, ...], turns: bool, restart: bool, repository: str | None
) -> None:
    """Train the stages and the turns, and upload the result if a repository is given.

    Args:
        recipe: the recipe to train.
        stages: the stages to train.
        turns: whether to take turns after them.
        restart: whether to delete earlier results of the stages and turns first.
        repository: OWNER/NAME on the hub, checked before anything is trained; None: no upload.
    """
    if repository is not None:
        check_hub(repository, HfApi())
    if stages:
        run(recipe, stages, restart)
    pair = take_turns(recipe, restart) if turns else recipe.output
    if repository is not None and int(os.environ.get("RANK", "0")) == 0:
        for pushed in push(pair, repository, HfApi()):
            print(f"pushed to {pushed}")


def evaluation_parser() -> argparse.ArgumentParser:
    """The parser of the arguments of `wheels evaluate`."""
    parser = argparse.ArgumentParser(
        "wheels evaluate",
        description="Measure quality at several teacher rates: of all gates of a pair, or of a gateway.",
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="PAIR | key=value",
        help="directory with teacher, student and router; overrides of the recipe, e.g. task.name=jsonl",
    )
    parser.add_argument(
        "--recipe",
        help="the recipe that sets the task and the longest completion (default for a PAIR: demo)",
    )
    parser.add_argument(
        "--examples", type=positive, default=1000, help="number of test examples (default: %(default)s)"
    )
    parser.add_argument(
        "--spans",
        type=positive,
        nargs="*",
        help=f"span lengths to measure (default: {' '.join(map(str, SPANS))})",
    )
    parser.add_argument(
        "--no-curves",
        action="store_true",
        help="measure the calibrated budgets alone, which takes a fraction of the time for large models",
    )
    parser.add_argument(
        "--router",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="another router to measure (repeatable)",
    )
    _add_gateway_options(parser)
    parser.add_argument("--out", type=Path, help="directory for report.json and plots")
    parser.add_argument(
        "--json", action="store_true", help="print the report as one JSON object at the end of stdout"
    )
    return parser


def _add_gateway_options(parser: argparse.ArgumentParser) -> None:
    served = parser.add_argument_group(
        "to measure a running gateway, with or without a PAIR (API key: OPENAI_API_KEY)"
    )
    served.add_argument("--gateway", metavar="URL", help="address of the gateway")
    served.add_argument(
        "--budgets",
        type=fractions,
        nargs="+",
        help=f"budgets to measure; 0 and 1 are always added (default: {' '.join(map(str, BUDGETS))})",
    )
    served.add_argument(
        "--concurrency",
        type=positive,
        help=f"concurrent requests (default: {RunningGateway.concurrency})",
    )
    served.add_argument(
        "--span-tokens",
        type=positive,
        help="span_tokens of the gateway, as part of the bound (default: PAIR's)",
    )
    served.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="compare with an earlier measurement of a gateway, which --out wrote to DIR (repeatable)",
    )


def evaluate(argv: list[str]) -> int:
    """Run `wheels evaluate`.

    Raises:
        WheelsError: the arguments, or something that they name, cannot be used.
    """
    args = evaluation_parser().parse_intermixed_args(argv)
    overrides = []
    pairs = []
    for argument in args.arguments:
        if "=" in argument:
            overrides.append(argument)
        else:
            pairs.append(Path(argument))
    if len(pairs) > 1 or (not pairs and args.gateway is None):
        raise RecipeError("expected one PAIR, or --gateway URL")
    for pair in pairs:
        if not pair.is_dir():
            raise RecipeError(f"no such directory: {pair}")
    check_options(args, bool(pairs))
    if not pairs and args.recipe is None:
        raise RecipeError("--gateway URL needs --recipe, which sets the task: demo is the demo pair's")
    name = args.recipe or "demo"
    recipe = load_recipe(find_recipe(name), overrides)
    others = directories("--router", args.router, METHODS)
    earlier = earlier_reports(args.against, {*METHODS, *others} if pairs else {GATEWAY})
    task = task_of(recipe)
    torch.set_num_threads(recipe.threads)
    examples = task.test()[: args.examples]
    if args.recipe is None:
        print(f"{len(examples):,} test examples of the recipe {name}; --recipe names another")
    span_tokens = args.span_tokens or 0
    reports = []
    for pair in pairs:
        reports.append(evaluate_pair(pair, task, examples, curve_spans(args), recipe.max_tokens, others))
        span_tokens = span_tokens or RouterCheckpoint.load(pair / "router").config.span_tokens
    if args.gateway is not None:
        at_once = args.concurrency or RunningGateway.concurrency
        gateway = RunningGateway(args.gateway, recipe.max_tokens, at_once)
        measured = measure(
            gateway, task, examples, list(chain.from_iterable(args.budgets or [BUDGETS])), span_tokens
        )
        reports.append(gateway_report(measured))
    report = reports[0]
    for gateway_alone in reports[1:]:
        report = joined(report, gateway_alone)
    for name, other in earlier.items():
        report = joined(report, other, name)
    print(table(report))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "report.json").write_text(report.to_json() + "\n")
        plot(report, args.out)
    if args.json:
        print(report.to_json())
    return 0


def check_options(args: argparse.Namespace, has_pair: bool) -> None:
    """Raises RecipeError for an option that would do nothing."""
    of_pairs = {"--spans": args.spans is not None, "--no-curves": args.no_curves, "--router": args.router}
    of_gateways = {
        "--budgets": args.budgets,
        "--concurrency": args.concurrency,
        "--span-tokens": args.span_tokens,
        "--against": args.against,
    }
    for option, given in of_pairs.items():
        if given and not has_pair:
            raise RecipeError(f"{option} needs a PAIR: a gateway has one router, and no curves")
    for option, given in of_gateways.items():
        if given and args.gateway is None:
            raise RecipeError(f"{option} needs --gateway URL: it says how a running gateway is measured")


def curve_spans(args: argparse.Namespace) -> Sequence[int] | None:
    """Lengths of the curves' calls, in tokens; None: no curves. Raises RecipeError for options that clash."""
    if args.no_curves and args.spans is not None:
        raise RecipeError("--no-curves leaves out what --spans asks for: give one of them")
    if args.no_curves:
        return None
    return SPANS if args.spans is None else args.spans


def fractions(text: str) -> tuple[float, ...]:
    """The numbers of an argument, separated by commas, each in [0, 1]."""
    try:
        values = tuple(map(float, text.split(",")))
    except ValueError:
        values = (-1.0,)
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: a budget is a number from 0 to 1")
    return values


def positive(text: str) -> int:
    """The whole number of an argument of at least 1. Raises ValueError, which argparse reports."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def directories(option: str, entries: list[str], taken: Collection[str]) -> dict[str, Path]:
    """Directories by name, from entries NAME=DIR of an option.

    Raises:
        RecipeError: an entry has no name or no directory, or its name is taken.
    """
    named: dict[str, Path] = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not (name and equals and path):
            raise RecipeError(f"{option} {entry!r}: expected NAME=DIR")
        if name in taken or name in named:
            raise RecipeError(f"{option} {entry!r}: {name} is already the name of a method")
        named[name] = Path(path)
    return named


def earlier_reports(entries: list[str], taken: Collection[str]) -> dict[str, QualityReport]:
    """Earlier reports by name. Raises WheelsError if a name is taken, or there is no report of a gateway."""
    reports = {}
    for name, directory in directories("--against", entries, taken).items():
        reports[name] = QualityReport.read(directory)
    return reports
