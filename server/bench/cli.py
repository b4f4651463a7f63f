"""`wheels bench`: sections in order, their tables as they are done, one JSON object last."""

import argparse
import importlib
import json
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import aiohttp

from measuring.examples import load_examples
from measuring.json_lines import DataError
from server.bench.heavy import HeavyError
from server.bench.plan import Plan
from server.bench.results import Section
from server.local.arguments import PAIR_HELP, SHIPPED_PAIR, positive
from server.local.pair import Pair
from server.local.processes import ServiceError

SECTIONS = ("overhead", "cooperation", "speculative", "quality", "capacity", "peers")


def main(argv: list[str]) -> int:
    """Exit status: 0, or 1 when a server did not start, died or refused a request."""
    options = _parse(argv)
    pair, examples = Pair.in_directory(options.pair), options.pair / "examples.jsonl"
    if missing := [path for path in (*pair.missing(), examples) if not path.exists()]:
        print(f"wheels bench: not there: {', '.join(map(str, missing))}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the servers are ended
    work = Path(tempfile.mkdtemp(prefix="wheels-bench-"))
    rounds = options.rounds or (1 if options.quick else 5)
    sections: dict[str, Section] = {}
    try:
        with ExitStack() as stack:
            plan = Plan(pair, load_examples(examples), rounds, options.quick, work, stack, options.litellm)
            for name in options.section or SECTIONS:
                start = time.monotonic()
                sections[name] = importlib.import_module(f"server.bench.{name}").run(plan)
                _say(sections[name].markdown(name), options.json)
                _say(f"({name}: {time.monotonic() - start:.0f} s)\n", options.json)
                if options.out:
                    _write(sections[name], name, options.out)
    except (DataError, ServiceError, HeavyError, aiohttp.ClientError) as error:
        print(f"wheels bench: {error}\nLogs: {work}", file=sys.stderr)
        return 1
    shutil.rmtree(work)
    if options.json:
        print(json.dumps({name: section.as_dict() for name, section in sections.items()}))
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "wheels bench",
        description="Measure speed and quality beside vLLM's own server, speculative decoding and LiteLLM.",
    )
    parser.add_argument(
        "pair",
        nargs="?",
        type=Path,
        default=SHIPPED_PAIR,
        help=PAIR_HELP,
    )
    parser.add_argument(
        "--section", nargs="+", choices=SECTIONS, metavar="NAME", help=f"of {', '.join(SECTIONS)}"
    )
    parser.add_argument("--quick", action="store_true", help="one round, and less of everything")
    parser.add_argument("--rounds", type=positive, help="of every measurement (default: 5, quick: 1)")
    parser.add_argument("--out", type=Path, help="directory for one JSON file, table and plot per section")
    parser.add_argument("--json", action="store_true", help="print one JSON object, last on stdout")
    parser.add_argument(
        "--litellm", type=Path, metavar="PYTHON", help="a Python with LiteLLM's proxy, for the peers"
    )
    return parser.parse_args(argv)


def _say(text: str, to_stderr: bool) -> None:
    """With --json, stdout is for the one object."""
    print(text, file=sys.stderr if to_stderr else sys.stdout, flush=True)


def _write(section: Section, name: str, directory: Path) -> None:
    from server.bench.plots import plot

    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(section.as_dict(), indent=1) + "\n")
    (directory / f"{name}.md").write_text(section.markdown(name) + "\n")
    plot(name, section, directory)
