"""The router's part of a recipe: alternatives by type, and clear words for keys of older recipes."""

import pytest
import yaml
from pydantic import ValidationError

from training.cli import RECIPES
from training.config import Recipe
from training.gate_config import GateConfig

LEAST = {"span_tokens": 4, "ask_tokens": 1, "gain": {"type": "regret"}}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_that_ships_is_valid(path):
    Recipe.model_validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"gain": "excess"}, r"gain excess: write {type: regret}, as it is called now"),
        ({"gain": "kl"}, r"gain kl: is gone"),
        ({"gain": "differs"}, r"gain differs: is gone"),
        ({"gain": "quality"}, r"gain quality: write {type: quality}"),
        ({"horizon": "completion"}, r"horizon is gone: gain {type: quality}"),
        ({"teacher_references": 2}, r"teacher_references is part of gain: {type: quality}"),
        ({"objective": "constrained"}, r"objective constrained: write {type: constrained}"),
        ({"window": 1}, r"window is gone: sub-paths have one decision"),
        ({"objective": {"type": "constrained", "window": 4}}, r"window"),
        ({"prices": [1, 2]}, r"prices is part of objective"),
        ({"temperature": 1}, r"temperature is part of objective"),
        ({"clip": 1}, r"clip is part of gain"),
        ({"rate": 0.1}, r"rate is part of conditioning: {type: price}"),
        ({"conditioning": "prompt"}, r"conditioning prompt: write {type: prompt}"),
        ({"budget_prompt": "{percent}"}, r"budget_prompt is conditioning: {type: prompt, words"),
    ],
)
def test_a_key_of_an_older_recipe_is_answered_with_the_new_one(changes, problem):
    with pytest.raises(ValidationError, match=problem):
        GateConfig.model_validate(LEAST | changes)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"ask_tokens": 5}, "ask_tokens 5 is more than span_tokens 4"),
        ({"gain": {"type": "quality"}, "ask_tokens": 2}, "gain quality needs ask_tokens 1"),
        (
            {"objective": {"type": "constrained"}, "rounds": 1},
            "rounds 1 must be more than its start_rounds 1",
        ),
        (
            {"objective": {"type": "constrained"}, "conditioning": {"type": "price", "rate": 0.1}},
            "constrained aims at every budget",
        ),
        (
            {"objective": {"type": "constrained"}, "conditioning": {"type": "prompt"}},
            "objective constrained needs conditioning price",
        ),
        (
            {"gain": {"type": "quality"}, "objective": {"type": "constrained", "clip": 4}},
            "gain quality does not use objective.clip: leave it out",
        ),
        (
            {"gain": {"type": "quality"}, "objective": {"type": "constrained"}, "explore": 0.1},
            "gain quality does not use explore: leave it out",
        ),
        (
            {"gain": {"type": "quality"}, "conditioning": {"type": "prompt"}},
            "gain quality needs conditioning price",
        ),
        (
            {
                "gain": {"type": "quality"},
                "objective": {"type": "constrained"},
                "rollouts": {"type": "gateway", "url": "http://there"},
            },
            "objective constrained with gain quality needs rollouts in_process",
        ),
        ({"objective": {"type": "constrained", "prices": [2, 1]}}, "the lower price first"),
        ({"objective": {"type": "difference", "window": 1}}, "window"),
        ({"gain": {"type": "ratio", "clip": 1}}, "clip"),
        ({"conditioning": {"type": "prompt", "words": "half"}}, "it must have exactly one field,"),
        ({"conditioning": {"type": "prompt", "rate": 0.1}}, "rate"),
        ({"budgets": []}, "budgets: expected at least one"),
        ({"budgets": [0.2, 0.1]}, "increasing"),
        ({"budgets": [0.2, 0.2]}, "increasing"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, problem):
    with pytest.raises(ValidationError, match=problem):
        GateConfig.model_validate(LEAST | changes)


RECORDED = {"rollouts": {"type": "recorded", "directory": "traffic"}}
GATEWAY = {"rollouts": {"type": "gateway", "url": "http://there"}}


@pytest.mark.parametrize(
    ("rollouts", "changes", "named"),
    [
        (RECORDED, {"rounds": 2, "prompts": 4000, "epochs": 1}, "recorded do not use prompts, rounds:"),
        (RECORDED, {"explore": 0.1, "budgets": [0.1]}, "recorded do not use explore, budgets:"),
        (RECORDED, {"calibration_examples": 500}, "recorded do not use calibration_examples:"),
        (GATEWAY, {"rounds": 1, "prompts": 10, "budgets": [0.1]}, "gateway do not use rounds:"),
        (GATEWAY, {"explore": 0.0}, "gateway do not use explore:"),
        (
            GATEWAY,
            {"conditioning": {"type": "price", "rate": 0.15}},
            "gateway do not use conditioning.rate:",
        ),
    ],
)
def test_fields_that_do_nothing_with_served_completions_are_named(rollouts, changes, named):
    """Fields that repeat a default are named too."""
    GateConfig.model_validate(LEAST | rollouts)
    GateConfig.model_validate(LEAST | changes)
    with pytest.raises(ValidationError, match=f"rollouts {named} leave them out"):
        GateConfig.model_validate(LEAST | rollouts | changes)


def test_a_gateway_that_is_started_takes_routers():
    changes = {"rollouts": {"type": "gateway"}, "rounds": 3, "calibration_examples": 10}
    assert GateConfig.model_validate(LEAST | changes).rounds == 3


def test_a_policy_of_longer_calls_needs_a_teacher_that_writes():
    longer = LEAST | {"objective": {"type": "constrained"}, "ask_tokens": 2}
    GateConfig.model_validate(longer)
    with pytest.raises(ValidationError, match="constrained needs ask_tokens 1 with rollouts recorded"):
        GateConfig.model_validate(longer | RECORDED)


def test_by_default_the_objective_is_the_difference_form_by_price():
    config = GateConfig.model_validate(LEAST)
    assert (config.objective.type, config.conditioning.type) == ("difference", "price")
    assert config.template is None
    prompted = GateConfig.model_validate(LEAST | {"conditioning": {"type": "prompt", "words": "{percent}!"}})
    assert prompted.template == "{percent}!"
