"""`wheels bench`: runs sections in order, prints each one's tables when it is done, and JSON at the end."""

import argparse
import importlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp

from measuring.pair import Pair
from measuring.processes import ServiceError, exit_at_signals
from router.errors import WheelsError
from server.bench.plan import Plan
from server.bench.results import Section
from server.local.arguments import EXAMPLES, SHIPPED_PAIR, bare_pair, positive

SECTIONS = (
    "overhead",
    "cooperation",
    "speculative",
    "quality",
    "capacity",
    "peers",
    "gate",
    "teacher-call",
    "gpu-model",
)


def main(argv: list[str]) -> int:
    """Run the sections and print their tables.

    Raises:
        WheelsError: a server did not start, died or refused a request. A note names the directory of logs.
    """
    options = _parse(argv)
    pair = bare_pair(options.pair)
    exit_at_signals()
    work = Path(tempfile.mkdtemp(prefix="wheels-bench-"))
    with _naming_logs(work), ExitStack() as shared:
        stored = _measure(_plan(pair, options, work, shared), options)
    shutil.rmtree(work)
    if options.json:
        print(json.dumps(stored))
    return 0


@contextmanager
def _naming_logs(directory: Path) -> Iterator[None]:
    """Add a note to an error with the directory of the servers' logs."""
    try:
        try:
            yield
        except aiohttp.ClientError as error:
            raise ServiceError(str(error)) from error
    except WheelsError as error:
        error.add_note(f"Logs: {directory}")
        raise


def _plan(pair: Pair, options: argparse.Namespace, work: Path, shared: ExitStack) -> Plan:
    return Plan(
        pair=pair,
        examples_file=options.pair / EXAMPLES,
        rounds=options.rounds or (1 if options.quick else 5),
        quick=options.quick,
        work=work,
        shared=shared,
        litellm=options.litellm,
    )


def _measure(plan: Plan, options: argparse.Namespace) -> dict[str, Any]:
    """Run the sections, and show each one when it is done; returns them for JSON, by name."""
    stored: dict[str, Any] = {}
    for name in options.section or SECTIONS:
        start = time.monotonic()
        section: Section = _module(name).run(plan)
        stored[name] = section.as_dict()
        _say(section.markdown(name), options.json)
        _say(f"({name}: {time.monotonic() - start:.0f} s)\n", options.json)
        if options.out:
            _write(section, name, options.out)
    return stored


def _module(name: str) -> ModuleType:
    """A section's module."""
    return importlib.import_module(f"server.bench.{name.replace('-', '_')}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "wheels bench",
        description="Compare speed and quality with vLLM's own server, speculative decoding and LiteLLM.",
    )
    parser.add_argument(
        "pair",
        nargs="?",
        type=Path,
        default=SHIPPED_PAIR,
        help="directory with teacher/ and student/, and for most sections router/ and examples.jsonl "
        "(default: the shipped pair)",
    )
    parser.add_argument(
        "--section",
        nargs="+",
        choices=SECTIONS,
        metavar="NAME",
        help=f"sections to run (default: all): {', '.join(SECTIONS)}",
    )
    parser.add_argument("--quick", action="store_true", help="one short round of each section")
    parser.add_argument("--rounds", type=positive, help="rounds of each measurement (default: 5, quick: 1)")
    parser.add_argument(
        "--out", type=Path, help="directory for the JSON file, table and plot of each section"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end of stdout")
    parser.add_argument(
        "--litellm",
        type=Path,
        metavar="PYTHON",
        help="Python interpreter with LiteLLM's proxy installed, for the section peers",
    )
    options = parser.parse_args(argv)
    if options.litellm and "peers" not in (options.section or SECTIONS):
        parser.error("--litellm is for the section peers, which --section leaves out")
    return options


def _say(text: str, to_stderr: bool) -> None:
    """Print a text; with --json it goes to stderr, because stdout is for the one object."""
    print(text, file=sys.stderr if to_stderr else sys.stdout, flush=True)


def _write(section: Section, name: str, directory: Path) -> None:
    from server.bench.plots import plot

    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(section.as_dict(), indent=1) + "\n")
    (directory / f"{name}.md").write_text(section.markdown(name) + "\n")
    plot(name, section, directory)
