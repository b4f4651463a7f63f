"""The directories of a recipe, and checks that their contents match the recipe."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from router.checkpoint import CheckpointError, RouterCheckpoint
from training.config import Recipe, RecipeError
from training.export import is_link_to, remove
from training.loop.checkpoints import saved
from training.model_config import PretrainedConfig, Role
from training.record import (
    Record,
    changes,
    may_be_prolonged,
    model_record,
    read_record,
    router_record,
    tokenizer_record,
    without_length,
)

Stage = Role | Literal["router"]
STAGES: tuple[Stage, ...] = ("teacher", "student", "router")
CHEAPER = "cheaper_teachers"
"""Folder of an exported pair that holds a folder for each cheaper teacher, by name."""


@dataclass(frozen=True)
class Workspace:
    """The directories in which each stage keeps its checkpoints and puts its export."""

    recipe: Recipe

    @property
    def tokenizer(self) -> Path:
        """Directory of a tokenizer that is trained on the task."""
        return self.recipe.work / "tokenizer"

    def work(self, stage: Stage) -> Path:
        """Directory of the stage's checkpoints and logs."""
        return self.recipe.work / stage

    def exported(self, stage: Stage) -> Path:
        """Directory of the stage's export."""
        return self.recipe.output / stage

    def cheaper(self, name: str) -> Path:
        """Directory of a cheaper teacher's export."""
        return self.recipe.output / CHEAPER / name

    def is_exported(self, stage: Stage) -> bool:
        """Whether the stage is finished, so that its export exists."""
        file = "router.json" if stage == "router" else "config.json"
        return (self.exported(stage) / file).exists()

    def record(self, stage: Stage) -> Record:
        """The fields of the recipe that matter for the stage's result."""
        return router_record(self.recipe) if stage == "router" else model_record(self.recipe, stage)

    def restart(self, stages: tuple[Stage, ...]) -> None:
        """Delete the results of these stages, and the trained tokenizer if the first stage is among them."""
        for stage in stages:
            remove(self.work(stage))
            remove(self.exported(stage))
        if STAGES[0] in stages:
            remove(self.tokenizer)

    def check(self, stages: tuple[Stage, ...]) -> None:
        """Raises RecipeError if another recipe has run one of these stages, or a stage before them."""
        self._compare("tokenizer", self.tokenizer, read_record(self.tokenizer), tokenizer_record(self.recipe))
        last = max(map(STAGES.index, stages))
        for stage in STAGES[: last + 1]:
            if self.is_exported(stage):
                self._check_export(stage)
            else:
                self._check_checkpoint(stage)

    def _check_export(self, stage: Stage) -> None:
        directory = self.exported(stage)
        if directory.is_symlink() and stage != "router":
            config = self.recipe.model(stage)
            linked = (
                isinstance(config, PretrainedConfig)
                and config.is_ready
                and is_link_to(config.pretrained, directory)
            )
            if not linked:
                raise RecipeError(
                    f"{stage}: the recipe has changed: {directory} is {directory.resolve()}; {_WAY_OUT}"
                )
        else:
            self._compare(stage, directory, read_record(directory), self.record(stage))
        if stage == "router" and self.is_exported("student"):
            self._check_router()

    def _check_router(self) -> None:
        """Check that the router fits the student, which may have been trained again since."""
        try:
            RouterCheckpoint.load(self.exported("router")).check_student(self.exported("student"))
        except CheckpointError as error:
            raise RecipeError(f"router: {error}; --restart --stage router fits one to it") from error

    def _check_checkpoint(self, stage: Stage) -> None:
        checkpoint = saved(self.work(stage))
        if checkpoint is None or checkpoint.record is None:
            return
        before = checkpoint.record
        now = self.record(stage)
        if "schedule" in now and may_be_prolonged(before, now, checkpoint.step):
            before = without_length(before)
            now = without_length(now)
        self._compare(stage, self.work(stage), before, now)

    def _compare(self, stage: str, directory: Path, before: Record | None, now: Record) -> None:
        found = changes(before, now) if before is not None else []
        if found:
            raise RecipeError(
                f"{stage}: the recipe has changed since {directory} was made: {'; '.join(found)}; {_WAY_OUT}"
            )


_WAY_OUT = "--restart starts again (with --stage, these stages alone); another output and work keep both"
