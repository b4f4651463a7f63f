"""The commands that docs/tutorial.md shows exist, and their arguments are taken."""

import argparse
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import wheels
from server.config import load
from tests.helpers.paths import ROOT
from training.cli import evaluation_parser, find_recipe, training_parser
from training.config import load_recipe
from training.fetch.cli import fetch_parser
from training.gguf import import_parser

TUTORIAL = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
LONGEST = 150
PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "evaluate": evaluation_parser,
    "fetch": fetch_parser,
    "import": import_parser,
    "train": training_parser,
}


def typed() -> list[str]:
    """Every typed command; lines are joined while a quote is open."""
    commands = []
    for block in BLOCK.findall(TUTORIAL.read_text()):
        for line in block.splitlines():
            if line.startswith("$ "):
                commands.append(line.removeprefix("$ "))
            elif commands and commands[-1].count("'") % 2:
                commands[-1] += "\n" + line
    return commands


def test_the_tutorial_is_short_enough_to_be_read():
    assert len(TUTORIAL.read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize("command", [line for line in typed() if line.startswith("wheels ")])
def test_a_command_of_the_tutorial_is_accepted(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The files that earlier commands create exist."""
    monkeypatch.chdir(tmp_path)
    _, name, *arguments = shlex.split(command)
    assert name in wheels.COMMANDS
    for word in arguments:
        if word.startswith("runs/"):
            Path(word).mkdir(parents=True)
    if name == "serve":
        load(arguments)
        return
    args = PARSERS[name]().parse_intermixed_args(arguments)
    if name in ("train", "evaluate"):
        overrides = [word for word in arguments if "=" in word]
        load_recipe(find_recipe(args.recipe), overrides)


def test_other_programs_of_the_tutorial_are_common_ones():
    first = {shlex.split(line)[0] for line in typed()}
    assert first - {"wheels"} <= {"curl", "export", "mkdir", "python", "vllm"}
