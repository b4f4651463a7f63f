"""`wheels demo`: two real servers, one table, then a gateway to play with."""

import argparse
import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from measuring.chats import messages_of, shown
from measuring.examples import Example, load_examples
from measuring.gateway import GatewayClient, GatewayError, GatewayReply
from measuring.marking import mark, marked
from measuring.pair import START_SECONDS, Pair, Serving, free_port, serving
from measuring.processes import Child, exit_at_signals
from server.local.arguments import EXAMPLES, PAIR_HELP, SHIPPED_PAIR, complete_pair, positive
from server.local.measure import Answered, BudgetResult, answer_all, gap_recovered

BUDGETS = (0.0, 0.05, 0.1, 0.2, 1.0)
SHOWN_BUDGETS = (0.1, 0.2)
SHOWN_COMPLETIONS = 5
USUAL_PORT = 8000


def main(argv: list[str]) -> int:
    """Start the pair, measure it, keep serving.

    Raises:
        WheelsError: a server did not start, died or refused a request.
    """
    options = _parse(argv)
    console = Console(stderr=options.json)  # with --json, stdout is for the one object
    pair = complete_pair(options.pair)
    examples = load_examples(options.pair / EXAMPLES)[: options.requests]
    logs = Path(tempfile.mkdtemp(prefix="wheels-demo-"))
    exit_at_signals()
    with _start(pair, logs, options, console) as servers:
        results = asyncio.run(_measure(servers, pair, examples, options.concurrency, console))
        _print_table(results.rows, console)
        if results.lost:
            console.print(f"The teacher was lost in {results.lost} requests, see {logs}", style="red")
        _print_completions(results.answered, pair, console)
        if options.json:
            print(results.to_json(), flush=True)
        if not options.once:
            _print_how_to_call(servers, examples[0], logs, console)
            _wait(servers)
    shutil.rmtree(logs)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "wheels demo",
        description="Start a teacher's vLLM server and the gateway, measure several budgets, keep serving.",
    )
    parser.add_argument("--once", action="store_true", help="stop after printing the table")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON at the end of stdout")
    parser.add_argument("--requests", type=positive, help="examples per budget (default: all)")
    parser.add_argument("--concurrency", type=positive, default=16, help="concurrent requests (default: 16)")
    parser.add_argument("--port", type=positive, help="the gateway's port (default: 8000, or a free one)")
    parser.add_argument("--gate", help="gate that decides when to ask (default: the pair's learned gate)")
    parser.add_argument(
        "--pair",
        type=Path,
        default=SHIPPED_PAIR,
        help=PAIR_HELP,
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=START_SECONDS,
        help="longest wait for the servers to start, in seconds",
    )
    return parser.parse_args(argv)


# --- starting ---


@contextmanager
def _start(pair: Pair, logs: Path, options: argparse.Namespace, console: Console) -> Iterator[Serving]:
    """Start both servers, with a progress display while they load."""
    flags = ["--examples", str(options.pair / EXAMPLES)]
    if options.gate:
        flags += ["--gate", options.gate]
    port = options.port or free_port(preferred=USUAL_PORT)
    console.print(f"Starting two vLLM engines (their logs: {logs})", highlight=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True)
    progress.start()
    try:
        watch = _watch(progress)
        with serving(pair, logs, port=port, flags=flags, timeout=options.timeout, watch=watch) as servers:
            progress.stop()
            yield servers
    finally:
        progress.stop()


def _watch(progress: Progress) -> Callable[[list[Child]], None]:
    tasks: dict[str, TaskID] = {}
    start = time.monotonic()

    def watch(children: list[Child]) -> None:
        for child in children:
            name = child.service.name
            if name not in tasks:
                tasks[name] = progress.add_task(f"{name} is loading", total=None)
            elif child.ready and not progress.tasks[tasks[name]].finished:
                progress.update(tasks[name], description=f"{name} is ready", total=1, completed=1)
                seconds = time.monotonic() - start
                progress.console.print(f"  {name} ready after {seconds:.0f} s", highlight=False)

    return watch


# --- measuring ---


@dataclass
class DemoResults:
    """Results of the gateway at every budget."""

    answered: dict[float, list[Answered]] = field(default_factory=dict)
    """Examples with their replies, by budget."""
    rows: list[BudgetResult] = field(default_factory=list)

    @property
    def lost(self) -> int:
        """Requests in which the teacher was lost."""
        lost = 0
        for answers in self.answered.values():
            lost += sum(answer.reply.degraded for answer in answers)
        return lost

    def to_json(self) -> str:
        """The rows, for `--json`."""
        return json.dumps({"rows": list(map(asdict, self.rows))})


async def _measure(
    servers: Serving, pair: Pair, examples: Sequence[Example], concurrency: int, console: Console
) -> DemoResults:
    """Ask all examples at every budget.

    Raises:
        ServiceError: a server died or refused a request.
    """
    from router.checkpoint import RouterCheckpoint  # brings torch, which `wheels demo --help` can do without

    assert pair.router is not None  # a pair in a directory has a router
    span_tokens = RouterCheckpoint.load(pair.router).config.span_tokens
    try:
        async with GatewayClient(servers.gateway, concurrency=concurrency) as client:
            await answer_all(client, examples[:concurrency], budget=0.5)  # the engines' first steps are slow
            return await _measure_budgets(client, examples, span_tokens, console)
    except GatewayError as error:
        servers.check()  # a dead server explains itself better
        raise servers.gateway_process.error(f"failed a request ({error})") from error


async def _measure_budgets(
    client: GatewayClient, examples: Sequence[Example], span_tokens: int, console: Console
) -> DemoResults:
    results = DemoResults()
    columns = (
        TextColumn("budget {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        for budget in BUDGETS:
            task = progress.add_task(f"{budget:g}", total=len(examples))
            start = time.perf_counter()
            answered = await answer_all(client, examples, budget, partial(progress.advance, task))
            seconds = time.perf_counter() - start
            results.answered[budget] = answered
            results.rows.append(
                BudgetResult.from_answers(answered, budget=budget, span_tokens=span_tokens, seconds=seconds)
            )
    return results


# --- showing ---

HEADINGS = (
    "budget",
    "exact\nmatch",
    "edit\nsimilarity",
    "teacher\nrate",
    "calls per\nrequest",
    "above bound\n(tokens)",
    "tokens/s",
)


def _print_table(rows: Sequence[BudgetResult], console: Console) -> None:
    table = Table(title="What a budget of teacher tokens buys", title_justify="left", box=SIMPLE_HEAD)
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for result in rows:
        table.add_row(
            f"{result.budget:g}",
            f"{result.exact_match:.1%}",
            f"{result.similarity:.3f}",
            f"{result.teacher_rate:.1%}",
            f"{result.calls_per_request:.2f}",
            f"{result.max_excess_tokens:g}",
            f"{result.tokens_per_second:,.0f}",
        )
    console.print(table)
    shares: list[str] = []
    for budget in SHOWN_BUDGETS:
        share = gap_recovered(rows, budget)
        if share is not None:
            shares.append(f"{share:.0%} at budget {budget:g}")
    text = ", ".join(shares) or "there is none"
    console.print(f"Gap between student and teacher recovered: {text}.\n", highlight=False)


class Comparison(NamedTuple):
    """One example at two budgets."""

    alone: Answered
    """Reply of the student alone."""
    helped: Answered


def _print_completions(answered: dict[float, list[Answered]], pair: Pair, console: Console) -> None:
    """Examples that the student alone gets wrong, with the spans that the teacher wrote."""
    tokenizer = Tokenizer.from_file(str(pair.student / "tokenizer.json"))
    budget = SHOWN_BUDGETS[0]
    wrong: list[Comparison] = []
    for comparison in map(Comparison, answered[0.0], answered[budget]):
        if not comparison.alone.right and len(wrong) < SHOWN_COMPLETIONS:
            wrong.append(comparison)
    if not wrong:
        return
    legend = Text.assemble("The student alone, and at budget ", f"{budget:g}", " with ")
    legend.append_text(mark("the teacher's spans", colour=_has_colour(console)))
    console.print(legend, highlight=False)
    for comparison in wrong:
        console.print()
        console.print(Text(f"    {shown(comparison.alone.example.source)}", style="dim"))
        lines = Table.grid(padding=(0, 1))
        for answer in comparison:
            verdict = Text("  ✓", style="green") if answer.right else Text("  ✗", style="red")
            lines.add_row(verdict, _coloured(answer.reply, tokenizer, console))
        console.print(lines)
    console.print()


def _coloured(reply: GatewayReply, tokenizer: Tokenizer, console: Console) -> Text:
    """The reply's text with the teacher's spans marked."""
    return marked(tokenizer.decode, reply.token_ids, reply.spans, colour=_has_colour(console))


def _has_colour(console: Console) -> bool:
    return console.color_system is not None


def _print_how_to_call(servers: Serving, example: Example, logs: Path, console: Console) -> None:
    messages = messages_of(example.source)
    url = servers.gateway
    body = json.dumps(
        {"model": "wheels", "messages": messages, "teacher_budget": 0.1},
        ensure_ascii=False,
    )
    console.print(f"[bold]Serving at {url}[/] (Ctrl-C stops; logs in {logs}). Call it like this:\n")
    console.print(
        escape(
            f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n  -d '{body}'\n\n"
            "from openai import OpenAI\n"
            f'client = OpenAI(base_url="{url}/v1", api_key="none")\n'
            "reply = client.chat.completions.create(\n"
            '    model="wheels",\n'
            f"    messages={json.dumps(messages, ensure_ascii=False)},\n"
            '    extra_body={"teacher_budget": 0.1},\n'
            ")\n"
            "print(reply.choices[0].message.content, reply.teacher)"
        ),
        highlight=False,
        soft_wrap=True,
    )


# --- waiting ---


def _wait(servers: Serving) -> None:
    """Wait until Ctrl-C.

    Raises:
        ServiceError: a server died.
    """
    with suppress(KeyboardInterrupt):
        while True:
            servers.check()
            time.sleep(1)
