"""Trains student and gate in turns.

In each turn, the student first learns at the positions where its gate does not ask. Then a new gate is
trained for the new student. A turn is a recipe of its own that goes on from the best pair so far. Turns end
with the first one that is no better on validation data.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from training.config import Recipe, RecipeError, TurnsConfig
from training.evaluation.in_process import Evaluation
from training.export import remove
from training.gating.calibration import standard_error
from training.method_config import JointConfig
from training.model_config import PretrainedConfig
from training.pipeline import run, task_of


@dataclass(frozen=True)
class TrainedTurn:
    """A pair that was trained, and its quality on validation data."""

    pair: Path
    """Directory of teacher, student and router."""
    qualities: Tensor
    """(examples,) quality of each validation example, as the mean over the budgets. Each budget is enforced
    by its bucket, and the gate asks at the budget's calibrated price.
    """

    @property
    def quality(self) -> float:
        """Mean quality over the examples."""
        return self.qualities.mean().item()

    def is_better(self, other: "TrainedTurn") -> bool:
        """Whether its mean quality is higher by more than one standard error of the examples' differences."""
        gains = self.qualities - other.qualities
        return gains.mean().item() > standard_error(gains)


def take_turns(recipe: Recipe, restart: bool = False) -> Path:
    """Train student and gate in turns, after all stages of a recipe. An interrupted run is resumed.

    Args:
        recipe: a recipe that has `turns`.
        restart: whether to delete the results of earlier turns first.

    Returns:
        The directory of the best pair: the recipe's `output`, or a turn's directory next to it.

    Raises:
        RecipeError: as `turns_of` raises it.
        Stopped: as `pipeline.run` raises it.
    """
    turns = turns_of(recipe)
    if restart:
        for number in range(1, turns.most + 1):
            remove(output_of(recipe, number))
            remove(work_of(recipe, number))
    best = TrainedTurn(recipe.output, worth(recipe, recipe.output))
    print(f"turn 0: {best.quality:.4f} on validation data ({best.pair})", flush=True)
    for number in range(1, turns.most + 1):
        run(recipe_of(recipe, turns, number, best.pair))
        turn = TrainedTurn(output_of(recipe, number), worth(recipe, output_of(recipe, number)))
        better = turn.is_better(best)
        shown = "better" if better else "no better: turns end here"
        print(f"turn {number}: {turn.quality:.4f} ({turn.pair}), {shown}", flush=True)
        if not better:
            break
        best = turn
    print(f"the best pair is in {best.pair}", flush=True)
    return best.pair


def turns_of(recipe: Recipe) -> TurnsConfig:
    """The recipe's `turns`. Raises RecipeError if it has none, or if there are several processes."""
    if recipe.turns is None:
        raise RecipeError("--stage turns: the recipe has no turns")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("turns: a router is trained by one process, so start without torchrun")
    return recipe.turns


def worth(recipe: Recipe, pair: Path) -> Tensor:
    """Quality (examples,) of a pair on each validation example, see `TrainedTurn.qualities`."""
    task = task_of(recipe)
    examples = task.valid()[: recipe.router.calibration_examples]
    evaluation = Evaluation(pair, task, examples, recipe.max_tokens, {})
    return evaluation.served_qualities(recipe.router.budgets)


def recipe_of(recipe: Recipe, turns: TurnsConfig, number: int, before: Path) -> Recipe:
    """The recipe of one turn.

    Args:
        recipe: the recipe that has `turns`.
        turns: its `turns`.
        number: number of the turn, from 1.
        before: directory of the pair that the turn goes on from.
    """
    method = JointConfig(
        type="joint",
        router=before / "router",
        rates=turns.rates,
        temperature=turns.temperature,
        anchor=turns.anchor,
        budget_prompt=recipe.router.template,
    )
    student = PretrainedConfig(pretrained=str(before / "student"), method=method, schedule=turns.schedule)
    bfloat16 = isinstance(recipe.teacher, PretrainedConfig) and recipe.teacher.dtype == "bfloat16"
    dtype: Literal["bfloat16", "float32"] = "bfloat16" if bfloat16 else "float32"
    teacher = PretrainedConfig(pretrained=str(recipe.output / "teacher"), dtype=dtype)
    update = {"teacher": teacher, "student": student, "tokenizer": None, "turns": None}
    places = {"output": output_of(recipe, number), "work": work_of(recipe, number)}
    return recipe.model_copy(update=update | places)


def output_of(recipe: Recipe, number: int) -> Path:
    """Directory of a turn's pair, next to the recipe's own output."""
    return recipe.output.with_name(f"{recipe.output.name}-turn{number}")


def work_of(recipe: Recipe, number: int) -> Path:
    """Directory of a turn's checkpoints."""
    return recipe.work / f"turn{number}"
