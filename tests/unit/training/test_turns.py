"""Student and gate are trained in turns."""

from pathlib import Path

import pytest
import torch

from router.checkpoint import RouterCheckpoint
from tests.helpers.commands import train
from tests.helpers.numbers import save_untrained_pair, tokenizer_of_numbers
from tests.helpers.recipes import ROUTER, write_recipe
from training import turns
from training.config import RecipeError, load_recipe
from training.turns import TrainedTurn, take_turns

WORTH = {"pair": 0.5, "pair-turn1": 0.6, "pair-turn2": 0.6}


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ready")
    save_untrained_pair(tokenizer_of_numbers(), directory)
    return directory


@pytest.fixture
def recipe(ready, tmp_path):
    return write_recipe(
        tmp_path,
        ready,
        output=f"{tmp_path}/pair",
        router=ROUTER | {"prompts": 4, "calibration_examples": 2},
        turns={"most": 3, "schedule": {"steps": 1, "batch": 2, "learning_rate": 0.01, "compile": False}},
    )


def test_turns_go_on_from_the_best_pair_and_end_when_none_is_better(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(turns, "worth", lambda _, pair: torch.full((4,), WORTH[pair.name]))
    assert train([recipe]) == 0
    assert "the best pair is in " + str(tmp_path / "pair-turn1") in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("pair*")) == ["pair", "pair-turn1", "pair-turn2"]
    for name in ("pair", "pair-turn1", "pair-turn2"):
        RouterCheckpoint.load(tmp_path / name / "router").check_student(tmp_path / name / "student")
    second = (tmp_path / "pair-turn2" / "student" / "recipe.json").read_text()
    assert str(tmp_path / "pair-turn1" / "router") in second


def test_existing_turns_are_not_trained_again(recipe, tmp_path):
    assert train([recipe]) == 0  # untrained models get nothing right, so one turn is no better
    file = tmp_path / "pair-turn1" / "router" / "router.json"
    before = file.stat().st_mtime_ns
    assert take_turns(load_recipe(Path(recipe))) == tmp_path / "pair"
    assert file.stat().st_mtime_ns == before
    assert not (tmp_path / "pair-turn2").exists()


@pytest.mark.parametrize(
    ("gains", "better"),
    [([0.0, 0.0], False), ([0.1, 0.1], True), ([0.3, -0.1], False), ([0.3, 0.1], True), ([0.5], False)],
)
def test_better_is_more_than_one_standard_error(tmp_path, gains, better):
    """[.3, -.1] has a mean of .1 and a standard error of .2; [.3, .1] has .2 and .1."""
    before = TrainedTurn(tmp_path, torch.zeros(len(gains)))
    assert TrainedTurn(tmp_path, torch.tensor(gains)).is_better(before) is better


def test_turns_that_the_recipe_does_not_have_are_refused(recipe, capsys):
    assert train([recipe, "--stage", "turns", "turns=null"]) != 0
    assert "--stage turns: the recipe has no turns" in capsys.readouterr().err


def test_turns_are_for_one_process(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="without torchrun"):
        take_turns(load_recipe(Path(recipe)))


def test_turns_that_cannot_be_taken_are_refused_before_anything_is_trained(
    recipe, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train([recipe]) != 0
    assert "without torchrun" in capsys.readouterr().err
    assert not (tmp_path / "pair").exists()


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["teacher={url: 'http://127.0.0.1:9'}"], "turns: method joint needs the teacher in process"),
        (
            [
                "router={span_tokens: 2, ask_tokens: 1, gain: {type: regret}}",
                "router.rollouts={type: recorded, directory: x}",
            ],
            "turns: need rollouts in_process",
        ),
    ],
)
def test_turns_need_both_models_here(recipe, capsys, overrides, problem):
    assert train([recipe, *overrides]) != 0
    assert problem in capsys.readouterr().err
