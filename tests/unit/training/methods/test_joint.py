"""Joint training of student and gate: its two limits, budgets in words, and refusals."""

import pytest
import torch

from router.checkpoint import Fingerprints, RouterCheckpoint, RouterConfig, fingerprint
from router.gate import LearnedGate
from router.reserved import ReservedRows
from tests.helpers.commands import train
from tests.helpers.numbers import tokenizer_of_numbers
from tests.helpers.recipes import ROUTER, SCHEDULE, write_recipe
from training.batches import Batch, Demonstrations
from training.method_config import JointConfig, KDConfig
from training.methods import KD, Joint
from training.model_config import Shape
from training.models import new_model, save_model
from training.tasks import make_task

torch.set_num_threads(1)
SHAPE = Shape(hidden=32, layers=1, heads=1, feed_forward=32)
RESERVED = ReservedRows(300)
NEVER = 1e9
"""A price above every score, which gives plain distillation."""


@pytest.fixture(scope="module")
def task():
    return make_task("numbers")


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of_numbers()


@pytest.fixture(scope="module")
def student(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("pair") / "student"
    save_model(new_model(SHAPE, tokenizer, 0), tokenizer, directory)
    return directory


def router(student, directory, price: float):
    """A router with a random gate, whose calibration has one price."""
    torch.manual_seed(0)
    RouterCheckpoint(
        config=RouterConfig(
            reserved_start=RESERVED.start,
            reserved_count=RESERVED.count,
            gate_width=8,
            span_tokens=1,
            expected_tokens=20,
            calibration={"learned": [(0.1, price)]},
            fingerprints=Fingerprints(
                student=fingerprint(student, RESERVED.start), tokenizer="1" * 64, teacher="t"
            ),
        ),
        taps=torch.randn(RESERVED.count - 1, SHAPE.hidden),
        gate=LearnedGate(RESERVED, 8).state_dict(),
    ).save(directory)
    return directory


def joint(student, directory, tokenizer, teacher, price, **settings):
    config = JointConfig(type="joint", router=router(student, directory, price), rates=(0.1,), **settings)
    return Joint(config, len(tokenizer), teacher, tokenizer.eos_token_id)


def test_an_infinite_price_is_plain_distillation(task, tokenizer, student, tmp_path):
    model, teacher = new_model(SHAPE, tokenizer, 0), new_model(SHAPE, tokenizer, 1)
    batch = Demonstrations(task, tokenizer, 4, seed=0)[0]
    plain = KD(KDConfig(type="kd"), len(tokenizer), teacher).loss(model, batch)[0].item()
    never = joint(student, tmp_path, tokenizer, teacher, NEVER, anchor=0.0).loss(model, batch)
    assert never[0].item() == pytest.approx(plain, rel=1e-5)
    assert never[1]["asks"] == 0
    # At a price of 0 the teacher writes everything, and only the anchor is left.
    always = joint(student, tmp_path, tokenizer, teacher, -NEVER, anchor=0.25).loss(model, batch)
    assert always[0].item() == pytest.approx(0.25 * plain, rel=1e-5)
    some = joint(student, tmp_path, tokenizer, teacher, 0.0, anchor=0.0).loss(model, batch)
    assert 0 < some[1]["asks"] < 1
    assert 0 < some[0] < plain


def test_teacher_equal_to_student_gives_zero_loss(task, tokenizer, student, tmp_path):
    model, teacher = new_model(SHAPE, tokenizer, 0), new_model(SHAPE, tokenizer, 0)
    loss, _ = joint(student, tmp_path, tokenizer, teacher, 0.0).loss(
        model, Demonstrations(task, tokenizer, 4, seed=0)[0]
    )
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert max(p.grad.abs().max().item() for p in model.parameters()) < 1e-5


def test_a_budget_in_words_is_the_students_alone(task, tokenizer, student, tmp_path):
    """The teacher equals the student: the loss is not zero, because only one of the two reads the words."""
    model, teacher = new_model(SHAPE, tokenizer, 0), new_model(SHAPE, tokenizer, 0)
    for p in [*model.parameters(), *teacher.parameters()]:
        p.data.mul_(4 if p.ndim == 2 else 1)  # freshly initialised weights make all tokens equally likely
    method = joint(student, tmp_path, tokenizer, teacher, NEVER, budget_prompt="{percent} ")
    method.tokenizer = tokenizer
    torch.manual_seed(0)
    loss, _ = method.loss(model, Demonstrations(task, tokenizer, 16, seed=0)[0])
    assert loss.item() > 1e-4


def test_answers_can_follow_other_prompts():
    batch = Batch.of([[5, 6], [7]], [[1, 2], [3, 4, 1]], pad=0)
    longer = batch.with_prompts([[5, 6], [8, 9, 7]], pad=0)
    assert longer.ids[:, :6].tolist() == [[5, 6, 1, 2, 0, 0], [8, 9, 7, 3, 4, 1]]
    assert longer.targets.equal(batch.targets)


@pytest.fixture
def recipe(student, tmp_path):
    return write_recipe(
        tmp_path,
        student.parent,
        teacher={"pretrained": str(student)},
        student={
            "pretrained": str(student),
            "method": {"type": "joint", "router": str(router(student, tmp_path / "router", 0.5))},
            "schedule": SCHEDULE | {"steps": 2, "batch": 4},
        },
        router=ROUTER | {"span_tokens": 1},
    )


def test_a_student_goes_on_with_its_router(recipe, tmp_path):
    assert train([recipe, "--stage", "student"]) == 0
    assert (tmp_path / "out" / "student" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("student.method.router=/no/where", "no router checkpoint in /no/where"),
        ("student.method.budget_prompt=half", "it must have exactly one field, {percent}"),
    ],
)
def test_impossible_combinations_are_refused(recipe, override, named, capsys):
    assert train([recipe, override, "--stage", "student"]) == 2
    assert named in capsys.readouterr().err


def test_a_router_of_another_student_is_refused(recipe, tokenizer, tmp_path, capsys):
    save_model(new_model(SHAPE, tokenizer, 7), tokenizer, tmp_path / "other")
    assert train([recipe, f"student.pretrained={tmp_path}/other", "--stage", "student"]) == 2
    assert "the router was trained for student" in capsys.readouterr().err
