"""What a run tells: a progress bar for people, `log.jsonl` and TensorBoard for later."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch.utils.tensorboard import SummaryWriter

from training import parallel

console = Console(highlight=False, soft_wrap=True)
"""Prints above the progress bar while there is one."""


class Progress:
    """Steps, tokens per second and time left; silent where standard output is no terminal."""

    def __init__(self, name: str, start: int, steps: int) -> None:
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[tokens]} tokens/s"), TimeElapsedColumn(), TimeRemainingColumn(),
            console=console, disable=not (console.is_terminal and parallel.is_first()),
        )  # fmt: skip
        self._task = self._bar.add_task(name, completed=start, total=steps, tokens="…")
        self._tokens = 0

    def __enter__(self) -> Progress:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)

    def advance(self, tokens: int) -> None:
        self._tokens += tokens
        elapsed = self._bar.tasks[0].elapsed
        rate = f"{self._tokens / elapsed:,.0f}" if elapsed else "…"
        self._bar.update(self._task, advance=1, tokens=rate)


class Log:
    """Scalars to `log.jsonl`, TensorBoard and standard output, by the first process alone.

    start: step of the checkpoint; what lies behind it is forgotten, because it is run again.
    """

    def __init__(self, directory: Path, start: int) -> None:
        self._name, self._file, self._board = directory.name, directory / "log.jsonl", None
        if not parallel.is_first():
            return
        directory.mkdir(parents=True, exist_ok=True)
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self._file.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= start))
        self._board = SummaryWriter(directory / "tensorboard", purge_step=start)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        if self._board is not None:
            self._board.close()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Raises FloatingPointError where one is not finite."""
        if not all(map(math.isfinite, metrics.values())):
            raise FloatingPointError(f"step {step}: a metric is not finite: {metrics}")
        if self._board is None:
            return
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step} | metrics) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        console.print(f"{self._name} {step} " + " ".join(f"{k}={v:.4g}" for k, v in metrics.items()))
        sys.stdout.flush()
