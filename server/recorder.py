"""`--record`: records what both models wrote, to train a router."""

import logging
import random
from pathlib import Path

from measuring.trajectories import Trajectory, TrajectoryFile, file_of
from router.budget import Budget
from server.choice import Choice

logger = logging.getLogger(__name__)


class Recorder:
    """Writes a share of all completions with a budget into a file of this gateway.

    It never harms a request: if the disk fails or the file is full, it logs that once and stops.

    Args:
        directory: directory of the files; it is made if it is missing.
        share: share of the completions to record, in (0, 1].
        max_bytes: size at which this gateway's file is full.
        draw: random numbers that decide which completions are recorded.
    """

    def __init__(
        self, directory: Path, share: float, max_bytes: int, draw: random.Random | None = None
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = file_of(directory)
        self._file: TrajectoryFile | None = TrajectoryFile(self._path, max_bytes)
        self._share = share
        self._draw = draw or random.Random()

    def note(self, choice: Choice) -> None:
        """Record a choice whose completion was ended by a model, a limit or a stop string."""
        if self._file is None or self._draw.random() >= self._share or not choice.completion.token_ids:
            return
        budget = choice.bucket.budget
        of_each = isinstance(budget, Budget) and bool(budget.owns)
        whole = budget.tokens is None and budget.calls is None and not of_each
        trajectory = Trajectory(
            prompt=list(choice.prompt_ids),
            tokens=list(choice.completion.token_ids),
            spans=[(start, end) for start, end in choice.report.spans if start < end],
            budget=budget.fraction if whole else None,
        )
        try:
            if not self._file.add(trajectory):
                self._stop("it is full")
        except OSError as error:
            self._stop(str(error))

    def _stop(self, problem: str) -> None:
        logger.warning("recording into %s stopped: %s", self._path, problem)
        self._file = None
