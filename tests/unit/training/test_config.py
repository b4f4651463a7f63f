"""Recipes: overrides, refusals, and the shipped ones."""

import pytest
import torch

from training.cli import RECIPES
from training.config import RecipeError, load_recipe

torch.set_num_threads(1)  # tiny models: threads only wait for each other


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        """
output: out
work: work
task: {name: numbers}
tokenizer: {size: 480}
teacher: &model
  shape: {hidden: 32, layers: 1, heads: 1, feed_forward: 32}
  method: {type: sft}
  schedule: {steps: 10, batch: 4, learning_rate: 1e-3}
student: *model
router: {span_tokens: 1, ask_tokens: 1, gain: {type: regret}}
"""
    )
    return path


def test_overrides_change_fields_of_the_recipe(recipe):
    loaded = load_recipe(recipe, ["teacher.schedule.steps=7", "router.gain.type=ratio"])
    assert (loaded.teacher.schedule.steps, loaded.router.gain.type) == (7, "ratio")
    assert loaded.student.schedule.steps == 10, "what an alias shares is changed in one place"


def test_null_takes_away_what_the_recipe_sets(recipe):
    recipe.write_text(recipe.read_text().replace("ask_tokens: 1,", "ask_tokens: 1, rounds: 5,"))
    assert load_recipe(recipe).router.rounds == 5
    recorded = "router.rollouts={type: recorded, directory: traffic}"
    with pytest.raises(RecipeError, match="rollouts recorded do not use rounds"):
        load_recipe(recipe, [recorded])
    assert load_recipe(recipe, [recorded, "router.rounds=null"]).router.rounds == 2
    assert load_recipe(recipe, ["router.rounds=null", "router.width=null"]).router.width == 64


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("teacher.schedule.stepz=7", "stepz"),
        ("nosuch=1", "nosuch"),
        ("student.method.type=magic", "magic"),
        ("teacher.schedule.steps=0", "steps"),
        ("steps", "key=value"),
    ],
)
def test_bad_settings_name_themselves(recipe, override, named):
    with pytest.raises(RecipeError, match=named):
        load_recipe(recipe, [override])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path):
    recipe = load_recipe(path)
    assert recipe.output.parts[:2] in {("deploy", "demo"), ("runs", path.stem)}
