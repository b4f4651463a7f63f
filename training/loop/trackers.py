"""Trackers, which write the metrics of a run to files or services."""

import importlib
import json
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from router.errors import UnusableInput


class TrackerError(UnusableInput):
    """A tracker's package is not installed; the message says how to install it."""


class Tracker(Protocol):
    """Writes the metrics of a run.

    It is made with the run's directory and the step that the run resumes from.
    """

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write the scalars of a step."""

    def close(self) -> None:
        """Finish writing at the end of the run."""


class JsonLines:
    """Writes `log.jsonl`. Lines after the step that the run resumes from are deleted first."""

    def __init__(self, directory: Path, start: int) -> None:
        self._file = directory / "log.jsonl"
        lines = self._file.read_text().split("\n") if self._file.exists() else []
        kept = []
        for line in lines:
            if line and json.loads(line)["step"] <= start:
                kept.append(line + "\n")
        self._file.write_text("".join(kept))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line with the scalars of a step."""
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step} | metrics) + "\n")

    def close(self) -> None:
        """Do nothing: the file is closed after each line."""


class TensorBoard:
    """Writes event files to the run's folder `tensorboard`."""

    def __init__(self, directory: Path, start: int) -> None:
        self._board = SummaryWriter(directory / "tensorboard", purge_step=start)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Add a point to the curve of each scalar."""
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event files."""
        self._board.close()


class WeightsAndBiases:
    """Writes to a run of `wandb`, named after its directory; a resumed run continues the same one."""

    def __init__(self, directory: Path, start: int) -> None:
        place = directory.resolve()
        self._run = _wandb().init(
            project="training-wheels",
            name="-".join(place.parts[-2:]),
            id=sha256(str(place).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(directory),
        )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log the scalars of a step."""
        self._run.log(metrics, step=step)

    def close(self) -> None:
        """Upload all remaining data."""
        self._run.finish()


def _wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise TrackerError("trackers: wandb is not installed; pip install wandb") from error


TRACKERS: dict[str, Callable[[Path, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def check_trackers(names: Iterable[str]) -> None:
    """Raises TrackerError if the package of a tracker is not installed."""
    if "wandb" in names:
        _wandb()
