"""A recipe with several teachers: its refusals, its exports, and its evaluation."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from router.checkpoint import RouterCheckpoint
from router.gate import TeachersGate
from tests.helpers.commands import train
from tests.helpers.recipes import write_recipe
from tests.helpers.taking_gateway import TakingGateway, stage_of
from training.config import RecipeError, load_recipe
from training.evaluation.in_process import Evaluation
from training.gating.cheaper import Cheaper
from training.models import load_model
from training.tasks import make_task
from training.tokenizer import load_tokenizer

torch.set_num_threads(1)


@pytest.fixture
def recipe(untrained_pair, tmp_path):
    cheaper = {
        "middle": {"pretrained": f"{untrained_pair}/teacher", "cost": 0.5},
        "small": {"pretrained": f"{untrained_pair}/student", "cost": 0.125},
    }
    return write_recipe(tmp_path, untrained_pair, max_tokens=4, cheaper_teachers=cheaper)


def test_teachers_are_ordered_by_their_cost(recipe):
    assert [name for name, _ in load_recipe(Path(recipe)).cheaper] == ["small", "middle"]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("router.objective={type: constrained}", "router.objective constrained: not possible with several"),
        ("router.gain={type: quality}", "router.gain quality: not possible with several"),
        ("router.conditioning={type: prompt}", "router.conditioning prompt: not possible with several"),
        ("turns={schedule: {steps: 1, batch: 1, learning_rate: 1}}", "turns: not possible with several"),
        (
            "cheaper_teachers.small={url: 'http://there', cost: 0.5}",
            "cheaper_teachers.small.url: router.rollouts in_process needs the teacher in process",
        ),
        (
            "router.rollouts={type: gateway}",
            "router.rollouts gateway without a url: not possible with several",
        ),
        (
            "cheaper_teachers.teacher={pretrained: there, cost: 0.5}",
            "cheaper_teachers.teacher: another model",
        ),
        ("cheaper_teachers.small.cost=1.5", r"cheaper_teachers.small.*cost.*less than or equal to 1"),
        ("cheaper_teachers.small.cost=null", r"cheaper_teachers.small.*cost"),
        ("tokenizer={size: 300}", "tokenizer.size: a pretrained model brings its own tokenizer"),
        ("cheaper_teachers.small={cost: 0.5}", "a cheaper teacher has pretrained or url"),
        ("cheaper_teachers={a name: {pretrained: there, cost: 0.5}}", "pattern"),
    ],
)
def test_impossible_settings_are_refused_by_name(recipe, override, problem):
    with pytest.raises(RecipeError, match=problem):
        load_recipe(Path(recipe), ["router.rounds=2", override])


def test_a_dry_run_needs_no_exported_model(recipe, tmp_path):
    assert train([recipe, "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()


def test_a_cheaper_teacher_of_another_vocabulary_is_refused(recipe, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    tokenizer = load_tokenizer(load_recipe(Path(recipe)).student.pretrained)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(other)
    assert train([recipe, f"cheaper_teachers.small.pretrained={other}"]) == 2
    assert "the teacher small" in capsys.readouterr().err


def test_the_router_has_an_output_for_each_and_is_evaluated_with_all(recipe, tmp_path, capsys):
    assert train([recipe]) == 0
    router = RouterCheckpoint.load(tmp_path / "out" / "router")
    assert [(output.teacher, output.cost) for output in router.outputs] == [
        ("small", 0.125),
        ("middle", 0.5),
        ("teacher", 1.0),
    ]
    for output in router.outputs:
        assert [rate for rate, _ in output.alone.points] == [0.2, 0.5]
    assert isinstance(router.learned_gate(), TeachersGate)
    assert [rate for rate, _ in router.calibration().points] == [0.2, 0.5]
    assert (tmp_path / "out" / "cheaper_teachers" / "small" / "config.json").exists()

    examples = make_task("numbers").test()[:3]
    evaluation = Evaluation(tmp_path / "out", make_task("numbers"), examples, 4, {})
    budgets = evaluation.budgets()
    assert [row["budget"] for row in budgets["learned"]] == [0.05, 0.1, 0.2, 0.3, 0.5]
    for name, cost in (("small", 0.125), ("middle", 0.5), ("teacher", 1.0)):
        for row in budgets[f"learned, {name} alone"]:
            assert row["cost"] == pytest.approx(cost * row["rate"])

    capsys.readouterr()
    assert train([recipe, "cheaper_teachers.small.cost=0.25"]) == 2
    assert "cheaper_teachers" in capsys.readouterr().err
    method = f"{{type: joint, router: {tmp_path}/out/router}}"
    schedule = "{steps: 1, batch: 1, learning_rate: 1}"
    joint = f"student={{pretrained: {tmp_path}/out/student, method: {method}, schedule: {schedule}}}"
    assert train([recipe, joint, f"output={tmp_path}/new", f"work={tmp_path}/new-work"]) == 2
    assert "method joint is for a router of one teacher" in capsys.readouterr().err


def test_a_router_of_one_output_notices_that_teachers_were_added(recipe, tmp_path, capsys):
    one = ["cheaper_teachers=null", "router.rounds=1"]
    assert train([recipe, *one]) == 0
    written = json.loads((tmp_path / "out" / "router" / "router.json").read_text())
    assert "teachers" not in written
    assert train([recipe, "router.rounds=1"]) == 2
    assert "cheaper_teachers {}, now" in capsys.readouterr().err


def test_a_gate_for_several_teachers_learns_from_completions_of_a_gateway(untrained_pair, tmp_path):
    """The gateway takes the gate, and its common prices are found there."""
    (tmp_path / "router").mkdir()
    gateway = TakingGateway(load_tokenizer(untrained_pair / "student"), directory=tmp_path / "router")
    small = Cheaper("small", 0.5, load_model(untrained_pair / "student"))
    stage = replace(stage_of(gateway, untrained_pair, 2), cheaper=[small])
    router = stage.run(tmp_path / "work", tmp_path / "out")
    assert [(output.teacher, output.alone) for output in router.outputs] == [
        ("small", None),
        ("teacher", None),
    ]
    assert [rate for rate, _ in router.calibration().points] == [0.1, 0.3]
    assert gateway.router().outputs == router.outputs
