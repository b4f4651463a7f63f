"""Keeps the weights of the best validation, and ends the run if there is no improvement."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from training import parallel
from training.loop.checkpoints import load_weights, save_weights
from training.method_config import Schedule


class Best:
    """The best validation so far, by `valid_quality`, and by `valid_similarity` if that is equal.

    Args:
        directory: directory of the run; the best weights are kept there as `best-STEP.pt`.
        schedule: says whether to keep the best weights, and when to end the run.
        state: result of `state` when the run was interrupted; empty at the start of a run.
    """

    def __init__(self, directory: Path, schedule: Schedule, state: dict[str, Any]) -> None:
        self._directory = directory
        self._keep = schedule.keep == "best"
        self._patience = schedule.patience
        self.step: int = state.get("step", 0)
        self._score: list[float] = state.get("score", [])
        self._misses: int = state.get("misses", 0)

    def state(self) -> dict[str, Any]:
        """The state to keep in the checkpoint."""
        return {"step": self.step, "score": self._score, "misses": self._misses}

    @property
    def exhausted(self) -> bool:
        """Whether `patience` validations have passed without a better one."""
        return 0 < self._patience <= self._misses

    def note(self, step: int, metrics: dict[str, float], model: PreTrainedModel) -> None:
        """Take note of a validation; if it is the best so far, keep the model's weights."""
        score = [metrics["valid_quality"], metrics["valid_similarity"]]
        if self._score and score <= self._score:
            self._misses += 1
            return
        self.step = step
        self._score = score
        self._misses = 0
        if self._keep:
            save_weights(self._file(step), model)

    def tidy(self) -> None:
        """Delete older weights; call it after a checkpoint that names the new ones."""
        if parallel.is_first():
            for file in self._directory.glob("best-*.pt"):
                if file != self._file(self.step):
                    file.unlink()

    def load_into(self, model: PreTrainedModel) -> bool:
        """Load the best weights into the model. Returns False if the model keeps its last weights."""
        if not self._keep or self.step == 0:
            return False
        load_weights(self._file(self.step), model)
        return True

    def _file(self, step: int) -> Path:
        return self._directory / f"best-{step}.pt"
