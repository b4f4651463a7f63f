"""Progress reports of a run: a progress bar, log lines and trackers."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from training import parallel
from training.loop.stopping import Diverged
from training.loop.trackers import TRACKERS, JsonLines, Tracker

console = Console(highlight=False, soft_wrap=True)
"""Console of all progress reports; it prints above the progress bar if there is one."""


class Progress:
    """A progress bar with steps, tokens per second and time left; hidden if stdout is not a terminal.

    Args:
        name: title of the bar.
        start: number of steps that are done already.
        steps: number of all steps.
    """

    def __init__(self, name: str, start: int, steps: int) -> None:
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[tokens]} tokens/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (console.is_terminal and parallel.is_first()),
        )
        self._task = self._bar.add_task(name, completed=start, total=steps, tokens="…")
        self._tokens = 0

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def advance(self, tokens: int) -> None:
        """Advance by one step, which trained `tokens` positions."""
        self._tokens += tokens
        elapsed = self._bar.tasks[0].elapsed
        rate = f"{self._tokens / elapsed:,.0f}" if elapsed else "…"
        self._bar.update(self._task, advance=1, tokens=rate)


class Log:
    """Writes scalars to the trackers and to stdout; only the first process writes.

    Args:
        directory: directory of the run.
        start: step of the checkpoint that the run resumes from; 0 without one.
        trackers: names of trackers in `TRACKERS`; `log.jsonl` is always written.
    """

    def __init__(self, directory: Path, start: int, trackers: Sequence[str] = ("tensorboard",)) -> None:
        self._name = directory.name
        self._trackers: list[Tracker] = []
        if parallel.is_first():
            directory.mkdir(parents=True, exist_ok=True)
            self._trackers.append(JsonLines(directory, start))
            for name in trackers:
                self._trackers.append(TRACKERS[name](directory, start))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for tracker in self._trackers:
            tracker.close()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log the scalars of a step. Raises Diverged if one of them is not finite."""
        if not all(map(math.isfinite, metrics.values())):
            raise Diverged(f"step {step}: a metric is not finite: {metrics}")
        if not parallel.is_first():
            return
        for tracker in self._trackers:
            tracker.write(step, metrics)
        shown = " ".join(f"{name}={value:.4g}" for name, value in metrics.items())
        console.print(f"{self._name} {step} {shown}")
        sys.stdout.flush()
