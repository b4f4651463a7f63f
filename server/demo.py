"""`wheels demo`: two real servers, one table, then a gateway to play with."""

import argparse
import asyncio
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from measuring.examples import Example, load_examples
from measuring.gateway import GatewayClient, GatewayError, Reply
from measuring.json_lines import DataError
from server.local.arguments import PAIR_HELP, SHIPPED_PAIR, positive
from server.local.measure import Answered, Row, answer_all, gap_recovered
from server.local.pair import START_SECONDS, Pair, Serving, free_port, serving
from server.local.processes import Child, ServiceError

BUDGETS = (0.0, 0.05, 0.1, 0.2, 1.0)
SHOWN_BUDGETS = (0.1, 0.2)
SHOWN_COMPLETIONS = 5
USUAL_PORT = 8000
TEACHER_STYLE = "bold black on yellow"


def main(argv: list[str]) -> int:
    """Exit status: 0, or 1 when a server did not start, died or refused a request."""
    options = _parse(argv)
    console = Console(stderr=options.json)  # with --json, stdout is for the one object
    pair, examples_file = Pair.in_directory(options.pair), options.pair / "examples.jsonl"
    if missing := [path for path in (*pair.missing(), examples_file) if not path.exists()]:
        console.print(f"wheels demo: not there: {', '.join(map(str, missing))}", markup=False)
        return 1
    try:
        examples = load_examples(examples_file)[: options.requests]
    except DataError as error:
        console.print(f"wheels demo: {error}", markup=False, highlight=False, soft_wrap=True)
        return 1
    logs = Path(tempfile.mkdtemp(prefix="wheels-demo-"))
    signal.signal(signal.SIGTERM, _exit_on_signal)  # as an exception, so that the servers are ended
    try:
        with _start(pair, logs, options, console) as servers:
            answered, rows = asyncio.run(_measure(servers, pair, examples, options.concurrency, console))
            _print_table(rows, console)
            if lost := sum(one.reply.degraded for at_budget in answered.values() for one in at_budget):
                console.print(f"The teacher was lost in {lost} requests, see {logs}", style="red")
            _print_completions(answered, pair, console)
            if options.json:
                print(json.dumps({"rows": [asdict(row) for row in rows]}), flush=True)
            if not options.once:
                _print_how_to_call(servers, examples[0], logs, console)
                _wait(servers)
    except ServiceError as error:
        console.print(f"wheels demo: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    shutil.rmtree(logs)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "wheels demo",
        description="Start a teacher's vLLM server and the gateway, measure several budgets, keep serving.",
    )
    parser.add_argument("--once", action="store_true", help="stop after the table")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, last on stdout")
    parser.add_argument("--requests", type=positive, help="examples per budget (default: all)")
    parser.add_argument("--concurrency", type=positive, default=16, help="requests at once (default: 16)")
    parser.add_argument("--port", type=positive, help="the gateway's port (default: 8000, or a free one)")
    parser.add_argument("--gate", help="what decides when to ask (default: the pair's learned gate)")
    parser.add_argument(
        "--pair",
        type=Path,
        default=SHIPPED_PAIR,
        help=PAIR_HELP,
    )
    parser.add_argument(
        "--timeout", type=float, default=START_SECONDS, help="longest wait for the servers, in seconds"
    )
    return parser.parse_args(argv)


# --- starting ---


@contextmanager
def _start(pair: Pair, logs: Path, options: argparse.Namespace, console: Console) -> Iterator[Serving]:
    """Both servers, with a progress display while they load."""
    flags = ["--examples", str(options.pair / "examples.jsonl")]
    if options.gate:
        flags += ["--gate", options.gate]
    port = options.port or free_port(preferred=USUAL_PORT)
    console.print(f"Starting two vLLM engines (their logs: {logs})", highlight=False)
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
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
    tasks: dict[str, int] = {}
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


async def _measure(
    servers: Serving, pair: Pair, examples: Sequence[Example], concurrency: int, console: Console
) -> tuple[dict[float, list[Answered]], list[Row]]:
    """Answered examples per budget, and their rows.

    Raises:
        ServiceError: a server died or refused a request.
    """
    from router.checkpoint import RouterCheckpoint  # brings torch, which `wheels demo --help` can do without

    span_tokens = RouterCheckpoint.load(pair.router).config.span_tokens
    answered: dict[float, list[Answered]] = {}
    rows: list[Row] = []
    columns = TextColumn("budget {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    try:
        async with GatewayClient(servers.gateway, concurrency=concurrency) as client:
            await answer_all(client, examples[:concurrency], budget=0.5)  # the engines' first steps are slow
            with Progress(*columns, console=console, transient=True) as progress:
                for budget in BUDGETS:
                    task = progress.add_task(f"{budget:g}", total=len(examples))
                    start = time.perf_counter()
                    answered[budget] = await answer_all(
                        client, examples, budget, advance=lambda task=task: progress.advance(task)
                    )
                    seconds = time.perf_counter() - start
                    rows.append(
                        Row.of(answered[budget], budget=budget, span_tokens=span_tokens, seconds=seconds)
                    )
    except GatewayError as error:
        servers.check()  # a dead server explains itself better
        raise servers.gateway_process.error(f"failed a request ({error})") from error
    return answered, rows


# --- showing ---


def _print_table(rows: Sequence[Row], console: Console) -> None:
    table = Table(title="What a budget of teacher tokens buys", title_justify="left", box=SIMPLE_HEAD)
    headings = "budget", "exact\nmatch", "edit\nsimilarity", "teacher\nrate", "calls per\nrequest"
    for heading in (*headings, "above bound\n(tokens)", "tokens/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row.budget:g}",
            f"{row.exact_match:.1%}",
            f"{row.similarity:.3f}",
            f"{row.teacher_rate:.1%}",
            f"{row.calls_per_request:.2f}",
            f"{row.max_excess_tokens:g}",
            f"{row.tokens_per_second:,.0f}",
        )
    console.print(table)
    shares = [(budget, gap_recovered(rows, budget)) for budget in SHOWN_BUDGETS]
    text = ", ".join(f"{share:.0%} at budget {budget:g}" for budget, share in shares if share is not None)
    console.print(f"Gap between student and teacher recovered: {text or 'there is none'}.\n", highlight=False)


def _print_completions(answered: dict[float, list[Answered]], pair: Pair, console: Console) -> None:
    """Examples that the student alone gets wrong, with the spans that the teacher wrote."""
    tokenizer = Tokenizer.from_file(str(pair.student / "tokenizer.json"))
    budget = SHOWN_BUDGETS[0]
    both = zip(answered[0.0], answered[budget], strict=True)
    wrong = [(alone, helped) for alone, helped in both if not alone.right][:SHOWN_COMPLETIONS]
    if not wrong:
        return
    legend = Text.assemble("The student alone, and at budget ", f"{budget:g}", " with ")
    legend.append_text(_mark("the teacher's spans", console))
    console.print(legend, highlight=False)
    for alone, helped in wrong:
        console.print()
        console.print(Text(f"    {alone.example.source}", style="dim"))
        lines = Table.grid(padding=(0, 1))
        for one in (alone, helped):
            verdict = Text("  ✓", style="green") if one.right else Text("  ✗", style="red")
            lines.add_row(verdict, _coloured(one.reply, tokenizer, console))
        console.print(lines)
    console.print()


def _coloured(reply: Reply, tokenizer: Tokenizer, console: Console) -> Text:
    """The reply's text with the teacher's spans marked."""
    whole = tokenizer.decode(reply.token_ids)

    def offset(tokens: int) -> int:
        # A prefix may end inside a character, which is then decoded as U+FFFD.
        return len(tokenizer.decode(reply.token_ids[:tokens]).rstrip("\ufffd"))

    text, end = Text(), 0
    for start, stop in ((offset(start), offset(stop)) for start, stop in reply.spans):
        text.append(whole[end:start])
        text.append_text(_mark(whole[start:stop], console))
        end = stop
    return text.append(whole[end:])


def _mark(text: str, console: Console) -> Text:
    """What the teacher wrote: in colour, or in brackets where there is none."""
    return Text(text, style=TEACHER_STYLE) if console.color_system else Text(f"⟦{text}⟧")


def _print_how_to_call(servers: Serving, example: Example, logs: Path, console: Console) -> None:
    source, url = example.source, servers.gateway
    body = json.dumps(
        {"model": "wheels", "messages": [{"role": "user", "content": source}], "teacher_budget": 0.1},
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
            f'    messages=[{{"role": "user", "content": {json.dumps(source, ensure_ascii=False)}}}],\n'
            '    extra_body={"teacher_budget": 0.1},\n'
            ")\n"
            "print(reply.choices[0].message.content, reply.teacher)"
        ),
        highlight=False,
        soft_wrap=True,
    )


# --- waiting and ending ---


def _wait(servers: Serving) -> None:
    """Until Ctrl-C; raises ServiceError when a server dies."""
    with suppress(KeyboardInterrupt):
        while True:
            servers.check()
            time.sleep(1)


def _exit_on_signal(number: int, _frame: object) -> None:
    sys.exit(128 + number)
