"""The `wheels` command: one name for every entry point.

A command's module is imported only when the command runs. So `wheels --help` answers in milliseconds;
importing vLLM or torch takes seconds.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import NamedTuple


class Command(NamedTuple):
    """One command of `wheels`."""

    target: str
    """The command's function, as `module:function`; it is called with the remaining arguments."""
    summary: str
    failure: int = 1
    """Exit status after an error whose class sets none."""


COMMANDS = {
    "serve": Command(
        "server.serve:main", "serve a student that asks its teacher for tokens, within a budget"
    ),
    "demo": Command("server.demo:main", "start the demo pair, measure it at several budgets, keep serving"),
    "calibrate": Command(
        "server.calibrate:main", "find the price of each teacher rate, from a file of prompts"
    ),
    "train": Command(
        "training.cli:train", "train a teacher, a student and a router from a recipe", failure=2
    ),
    "evaluate": Command("training.cli:evaluate", "measure quality at several teacher rates", failure=2),
    "import": Command("training.gguf:main", "convert a GGUF model to a Hugging Face directory"),
    "fetch": Command("training.fetch.cli:main", "create a data set for a recipe from a public source"),
    "bench": Command("server.bench.cli:main", "compare speed with vLLM, speculative decoding and LiteLLM"),
}


def usage() -> str:
    """The text that `wheels --help` prints."""
    rows = ""
    for name, command in COMMANDS.items():
        rows += f"  {name:<10}{command.summary}\n"
    return (
        "usage: wheels COMMAND [options]\n\n"
        "A small model writes, and asks a large one for the tokens that it would get wrong.\n\n"
        f"commands:\n{rows}\n"
        "`wheels COMMAND --help` lists a command's options; `wheels --version` prints the version."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    The status is 2 for a usage error and 130 after Ctrl-C. A `WheelsError` is printed in one line; its status
    is the one of its class, or else the command's.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"wheels {version('training-wheels')}")
        return 0
    if name not in COMMANDS:
        problem = f"unknown command {name!r}" if name else "no command given"
        print(f"wheels: {problem} (one of: {', '.join(COMMANDS)}; see `wheels --help`)", file=sys.stderr)
        return 2
    return _run(name, arguments[1:])


def _run(name: str, arguments: list[str]) -> int:
    from router.errors import WheelsError  # not at the top: `--help` works without it

    command = COMMANDS[name]
    module, function = command.target.split(":")
    try:
        run: Callable[[list[str]], int] = getattr(importlib.import_module(module), function)
        return run(arguments)
    except KeyboardInterrupt:
        return 130
    except WheelsError as error:
        print("\n".join([f"wheels {name}: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr)
        return command.failure if error.exit_status is None else error.exit_status


if __name__ == "__main__":
    sys.exit(main())
