"""`wheels calibrate`: learns the prices of a gateway from a file of prompts instead of live traffic.

A gateway that learns its prices gets the prompts as its traffic, and saves what it learned. The next gateway
with the same student, gate and spans starts from there (see `server.price_follower`).
"""

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from measuring.gateway import GatewayClient, GatewayError
from measuring.pair import GATEWAY, HOST, free_port
from measuring.processes import Service, exit_at_signals, running
from measuring.prompts import load_prompts
from router.gate_names import LEARNED
from server.config import (
    ENVIRONMENT_PREFIX,
    CommandLine,
    ConfigError,
    ServeConfig,
    add_settings,
    checked,
    flag_of,
    parse,
    read_settings,
)
from server.file_state import FileState
from server.local.arguments import positive
from server.local.rates import LEARNING_PASSES, NothingToLearn, RateFinder
from server.vllm_flags import read_flags, setting_name

START_SECONDS = 1800.0
RATES = (0.05, 0.1, 0.2, 0.3, 0.5)
FEW_TOKENS = 2_000
"""Number of completion tokens below which a rate is rough."""
SHARED = ("tenants", "limits", "ledger", "host", "port")
"""Settings that a gateway of our own does not get: it has no tenants, and only this command calls it."""
VLLM_SHARED = ("api-key", "ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "uds", "root-path")
"""Settings of vLLM's server that a gateway of our own does not get either."""


def main(argv: list[str]) -> int:
    """Find the prices, and print the rates that they realise.

    Raises:
        WheelsError: the arguments or prompts cannot be used, a server failed, or there is nothing to learn.
    """
    words, vllm_flags = CommandLine.of(argv)
    options = parse(_parser(), words)
    own = _own_gateway(options, vllm_flags)
    prompts = load_prompts(options.prompts)
    console = Console(stderr=options.json)  # with --json, stdout is for the one object
    exit_at_signals()
    with _progress(console) as progress:
        start = partial(_start, progress, len(prompts))
        kept = {} if own is None else own.prices()
        gateway = nullcontext(options.gateway) if own is None else _served(own, console)
        with gateway as url:
            client = GatewayClient(
                url,
                concurrency=options.concurrency,
                max_tokens=options.max_tokens,
                api_key=os.environ.get("OPENAI_API_KEY", "none"),
                temperature=options.temperature,
            )
            finder = RateFinder(client, prompts, options.passes, options.tolerance, start)
            try:
                asyncio.run(_find(finder, options.rates))
            except KeyboardInterrupt:
                console.print("Stopped. The prices learned so far are kept.")
                raise
            finally:
                _print_results(finder, console)
    if own is not None and own.prices() == kept:
        raise ConfigError(f"the prices could not be written to {own.directory}")
    place = "the cache of the gateway" if own is None else str(own.directory)
    console.print(
        f"Prices saved in {place}, for this student, gate and span length.", highlight=False, soft_wrap=True
    )
    if options.json:
        print(_as_json(finder))
    return 0


async def _find(finder: RateFinder, rates: list[float]) -> None:
    async with finder.client:
        await finder.find(rates)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "wheels calibrate",
        description="Send a file of prompts through a pair at several teacher rates, so that it learns its "
        "prices before users arrive. Give a running gateway, or a student and a teacher.",
        epilog="Put flags of the student's vLLM server after --.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "prompts",
        type=Path,
        help="JSON lines with source, prompt or messages; or a text file with a prompt on each line",
    )
    parser.add_argument("--gateway", metavar="URL", help="a running gateway (key: OPENAI_API_KEY)")
    parser.add_argument(
        "--rates",
        type=_rates,
        default=list(RATES),
        help=f"teacher rates, separated by commas (default: {','.join(map(str, RATES))})",
    )
    parser.add_argument(
        "--passes",
        type=_passes,
        default=5,
        help="most passes over the prompts for each rate (default: 5); the first pass only learns",
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.02, help="largest error of a realised rate (default: 0.02)"
    )
    parser.add_argument(
        "--max-tokens", type=positive, default=512, help="longest completion, in tokens (default: 512)"
    )
    parser.add_argument("--temperature", type=float, help="sampling temperature (default: the student's own)")
    parser.add_argument("--concurrency", type=positive, default=16, help="concurrent requests (default: 16)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=argparse.SUPPRESS,
        help=f"longest wait for the gateway to start, in seconds (default: {START_SECONDS:.0f})",
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON at the end of stdout")
    serve = parser.add_argument_group("settings of `wheels serve`, if there is no --gateway")
    serve.argument_default = argparse.SUPPRESS
    add_settings(serve)
    return parser


def _passes(text: str) -> int:
    value = positive(text)
    if value <= LEARNING_PASSES:
        raise argparse.ArgumentTypeError(f"must be more than {LEARNING_PASSES}")
    return value


def _rates(text: str) -> list[float]:
    rates = sorted(set(map(float, text.split(","))))
    if not all(0.0 < rate < 1.0 for rate in rates):
        raise argparse.ArgumentTypeError("a rate is between 0 and 1; at 0 and 1 there is no price to find")
    return rates


# --- a gateway of our own ---


class OwnGateway(NamedTuple):
    """A gateway that is started only for the prompts."""

    settings: dict[str, Any]
    vllm_flags: list[str]
    directory: Path
    """Directory in which it saves its prices."""
    timeout: float
    """Longest wait until it is ready, in seconds."""

    def prices(self) -> dict[Path, FileState]:
        """State of every file of prices, by its path."""
        return {file: FileState.of(file) for file in self.directory.glob("*.json")}


def _own_gateway(options: argparse.Namespace, vllm_flags: list[str]) -> OwnGateway | None:
    """The gateway to start by these arguments; None if they name a running one.

    Raises:
        ConfigError: the arguments name a running gateway and settings too, or a setting is wrong or missing.
        NothingToLearn: the gateway would not learn prices.
    """
    names = {"config", "timeout", *ServeConfig.model_fields} & vars(options).keys()
    if options.gateway is not None:
        if names or vllm_flags:
            named = ", ".join(map(flag_of, sorted(names))) or "what follows --"
            raise ConfigError(f"leave out {named}: the gateway at {options.gateway} has its own settings")
        return None
    settings = read_settings({name: getattr(options, name) for name in names - {"timeout"}})
    config = checked(settings, vllm_flags)
    if config.price is not None or config.gate == "random":
        fixed = "the random gate needs no price" if config.price is None else "the price is fixed by --price"
        raise NothingToLearn(f"{fixed}: there is nothing to find")
    if config.gate in (None, LEARNED) and _has_prices(config.router):
        raise NothingToLearn(
            f"the prices of {config.router} were measured in training: there is nothing to find; "
            "`wheels evaluate --gateway` shows what they realise"
        )
    shared = sorted(set(VLLM_SHARED) & read_flags(vllm_flags).keys())
    if shared:
        raise ConfigError(f"leave out --{shared[0]}: only `wheels calibrate` calls this gateway")
    kept = {name: value for name, value in settings.items() if name not in SHARED}
    kept["vllm"] = _without_shared(checked(settings, []).vllm)
    return OwnGateway(kept, vllm_flags, config.cache / "prices", getattr(options, "timeout", START_SECONDS))


def _has_prices(router: Path | None) -> bool:
    """Whether a router in a directory has prices for its gate; False for a name on the hub."""
    from router.checkpoint import RouterCheckpoint, is_awaited  # not at the top: it imports torch

    if router is None or not router.is_dir() or is_awaited(router):
        return False
    return LEARNED in RouterCheckpoint.load(router).config.calibration


def _without_shared(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if setting_name(name) not in VLLM_SHARED}


@contextmanager
def _served(own: OwnGateway, console: Console) -> Iterator[str]:
    """Start the gateway and yield its URL when it is ready; the gateway ends with the block."""
    port = free_port()
    url = f"http://{HOST}:{port}"
    with tempfile.TemporaryDirectory(prefix="wheels-calibrate-") as name:
        directory = Path(name)  # only this user may read it: the settings may hold keys
        file = directory / "settings.yaml"
        file.write_text(yaml.safe_dump(own.settings | {"host": HOST, "port": port}))
        variables = [each for each in os.environ if each.startswith(ENVIRONMENT_PREFIX)]
        service = Service(
            name="gateway",
            command=(*GATEWAY, "--config", str(file), "--", *own.vllm_flags),
            ready_url=f"{url}/ready",
            log=directory / "gateway.log",
            hidden=(*variables, "VLLM_API_KEY"),
        )
        console.print("Starting the gateway", highlight=False)
        with running([service], timeout=own.timeout) as (gateway,):
            try:
                yield url
            except GatewayError:
                gateway.check()  # if the gateway has died, its own error tells more
                raise


# --- showing ---


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """A progress bar on a terminal, nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


def _start(progress: Progress, prompts: int, rate: float, number: int) -> Callable[[], None]:
    for task in progress.task_ids:
        progress.remove_task(task)
    return partial(progress.advance, progress.add_task(f"rate {rate:g}, pass {number}", total=prompts))


def _print_results(finder: RateFinder, console: Console) -> None:
    if not finder.last:
        return
    table = Table(title="Teacher rates and their prices", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("rate\nasked", "rate\nrealised", "price", "completion\ntokens", "passes"):
        table.add_column(heading, justify="right")
    for rate, realised in sorted(finder.last.items()):
        table.add_row(
            f"{rate:g}",
            f"{realised.rate:.3f}",
            f"{finder.price(rate):.4g}",
            f"{realised.completion_tokens:,}",
            str(realised.passes),
        )
    console.print(table)
    for note in _notes(finder):
        console.print(note, highlight=False, soft_wrap=True)


def _notes(finder: RateFinder) -> list[str]:
    notes = []
    if far := sorted(finder.far()):
        named = ", ".join(f"{rate:g}" for rate in far)
        notes.append(f"More than {finder.tolerance:g} away: {named}. More prompts or --passes may help.")
    if min(each.completion_tokens for each in finder.last.values()) < FEW_TOKENS:
        notes.append(f"A pass has fewer than {FEW_TOKENS:,} completion tokens: its rate is rough.")
    if lost := sum(each.degraded for each in finder.last.values()):
        notes.append(f"The teacher was lost in {lost} requests: their rates are too low.")
    if limited := sum(each.limited for each in finder.last.values()):
        notes.append(f"Limits that requests share refused a span in {limited} requests.")
    return notes


def _as_json(finder: RateFinder) -> str:
    rows = []
    for rate, realised in sorted(finder.last.items()):
        rows.append(
            {
                "asked": rate,
                "realised": round(realised.rate, 6),
                "price": finder.price(rate),
                "completion_tokens": realised.completion_tokens,
                "passes": realised.passes,
                "is_near": realised.is_near(finder.tolerance),
            }
        )
    return json.dumps({"rows": rows})
