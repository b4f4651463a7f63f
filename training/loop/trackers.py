"""Trackers: where the metrics of a run are written."""

import importlib
import json
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from router.errors import UnusableInput


class TrackerError(UnusableInput):
    """A tracker that is not there; the message says how to install it."""


class Tracker(Protocol):
    """Made with the run's directory and the step it goes on from."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Take down the scalars of a step."""

    def close(self) -> None:
        """End of the run."""


class JsonLines:
    """`log.jsonl`; what was written after the step that the run goes on from is forgotten."""

    def __init__(self, directory: Path, start: int) -> None:
        self._file = directory / "log.jsonl"
        lines = self._file.read_text().split("\n") if self._file.exists() else []
        kept = []
        for line in lines:
            if line and json.loads(line)["step"] <= start:
                kept.append(line + "\n")
        self._file.write_text("".join(kept))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line."""
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step} | metrics) + "\n")

    def close(self) -> None:
        """Nothing is open between two lines."""


class TensorBoard:
    """Event files in `tensorboard`."""

    def __init__(self, directory: Path, start: int) -> None:
        self._board = SummaryWriter(directory / "tensorboard", purge_step=start)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """A point on every curve."""
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush."""
        self._board.close()


class WeightsAndBiases:
    """A run of `wandb`, under the name of its directory; a resumed run goes on in it."""

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
        """The scalars of a step."""
        self._run.log(metrics, step=step)

    def close(self) -> None:
        """Upload the rest."""
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
    """Raises TrackerError for one whose package is missing."""
    if "wandb" in names:
        _wandb()
