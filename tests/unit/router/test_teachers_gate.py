"""A gate with an output for each of several teachers, and its checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from router.checkpoint import CheckpointError, RouterCheckpoint
from router.gate import TeachersGate

ROWS = 14  # of the `reserved` fixture
COSTS = [0.25, 1.0]


@pytest.fixture
def gate(reserved) -> TeachersGate:
    return TeachersGate(reserved, 4, COSTS)


def test_an_output_is_what_a_teacher_is_worth(router_of_two):
    logits = torch.zeros(2, ROWS)
    logits[:, 11:13] = torch.tensor([[1.5, 0.5], [-2.0, 3.0]])  # the fixture's outputs are its taps
    gate = router_of_two.build_gate()
    torch.testing.assert_close(gate.worth(logits), torch.tensor([[1.5, 0.5], [-2.0, 3.0]]))
    torch.testing.assert_close(gate(logits), torch.tensor([3.0, 3.0]))  # 1.5 / .5 and 3 / 1


@pytest.mark.parametrize(
    ("worth", "score"),
    [
        ([0.5, 1.0], 2.0),  # .5 / .25 is more than 1 / 1
        ([0.2, 1.0], 1.0),
        ([-1.0, 0.5], 0.5),
        ([-1.0, -0.5], -0.5),  # below 0, costs do not count
    ],
)
def test_the_score_is_the_common_price_below_which_a_teacher_is_asked(gate, worth, score):
    worth = torch.tensor(worth)
    assert gate.common(worth).item() == score
    for price, asks in ((score - 0.01, True), (score + 0.01, False)):
        assert (gate.margins(worth, torch.tensor(price)).amax() > 0) == asks


def test_the_cheap_teacher_is_asked_unless_the_dear_one_is_worth_the_difference(gate):
    """At a common price of 2, the cheap teacher's price is .5 and the dear one's is 2."""
    worth = torch.tensor([[1.0, 2.0], [1.0, 2.6], [0.4, 2.6], [3.0, 3.0]])
    margins = gate.margins(worth, torch.tensor(2.0))
    assert margins.tolist() == pytest.approx(torch.tensor([[0.5, 0.0], [0.5, 0.6], [-0.1, 0.6], [2.5, 1.0]]))
    assert margins.argmax(-1).tolist() == [0, 1, 1, 0]


def test_a_least_price_holds_for_its_teacher(gate):
    margins = gate.margins(torch.tensor([3.0, 3.0]), torch.tensor(1.0), torch.tensor([2.5, -torch.inf]))
    assert margins.tolist() == [0.5, 2.0]


def test_costs_are_no_part_of_the_state(gate):
    assert not any("costs" in name for name in gate.state_dict())


# Its checkpoint


def edit(directory: Path, teachers: list[dict[str, Any]]) -> None:
    file = directory / "router.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"teachers": teachers}))


def test_a_router_of_several_teachers_is_what_was_saved(router_of_two, tmp_path):
    router_of_two.save(tmp_path)
    loaded = RouterCheckpoint.load(tmp_path)
    assert loaded.digest() == router_of_two.digest()
    assert [(output.teacher, output.cost) for output in loaded.outputs] == [("small", 0.5), ("big", 1.0)]
    logits = torch.randn(5, ROWS, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.learned_gate().worth(logits), router_of_two.learned_gate().worth(logits))


def test_a_router_of_one_output_is_written_as_before(router, tmp_path):
    """The digest, by which merged students are kept, stays the same too."""
    router.save(tmp_path)
    written = json.loads((tmp_path / "router.json").read_text())
    assert "teachers" not in written
    assert "teachers" not in json.loads(router.config.model_dump_json())
    assert router.outputs == ()


@pytest.mark.parametrize(
    ("teachers", "problem"),
    [
        ([("small", 0.5)], "set teachers only if there are several"),
        ([("big", 0.5), ("big", 1.0)], "two teachers have the same name"),
        ([("small", 2.0), ("big", 1.0)], "teachers must be ordered by cost"),
        ([("small", 0.0), ("big", 1.0)], "greater than 0"),
        ([("a name", 0.5), ("big", 1.0)], "pattern"),
        ([("small", 0.5), ("middle", 0.7), ("big", 1.0)], "size mismatch"),
    ],
)
def test_impossible_outputs_are_refused(router_of_two, teachers, problem, tmp_path):
    router_of_two.save(tmp_path)
    edit(tmp_path, [{"name": name, "cost": cost} for name, cost in teachers])
    with pytest.raises(CheckpointError, match=problem):
        RouterCheckpoint.load(tmp_path)


def test_the_prices_of_an_output_are_checked_too(router_of_two, tmp_path):
    router_of_two.save(tmp_path)
    teachers = [
        {"name": "small", "cost": 0.5, "calibration": [(0.3, 1), (0.1, 2)]},
        {"name": "big", "cost": 1},
    ]
    edit(tmp_path, teachers)
    with pytest.raises(CheckpointError, match="calibration rates must increase"):
        RouterCheckpoint.load(tmp_path)


def test_other_teachers_are_refused(router, router_of_two):
    router_of_two.check_teachers(["big", "small"])
    router.check_teachers(["anybody"])
    for others in (["teacher"], ["small", "huge"], ["small", "big", "huge"]):
        problem = f"between the teachers small, big, and here the models are {', '.join(others)}"
        with pytest.raises(CheckpointError, match=problem):
            router_of_two.check_teachers(others)
