"""Tokenizer, recipe and trainer: round trips, refusals, and a killed run that repeats itself exactly."""

import json
from itertools import islice

import pytest
import torch

from training.batches import Batch, Demonstrations
from training.config import KDConfig, RecipeError, Schedule, SFTConfig, Shape, load_recipe
from training.methods import KD, SFT
from training.methods.kd import forward_kl
from training.models import load_model, new_model, reserved_rows, save_model
from training.tasks import make_task
from training.tokenizer import decode_answers, encode_answers, encode_prompts, load_tokenizer, train_tokenizer
from training.trainer import train

torch.set_num_threads(1)  # tiny models: threads only wait for each other
SHAPE = Shape(hidden=32, layers=1, heads=1, feed_forward=32)


@pytest.fixture(scope="module")
def task():
    return make_task("numbers")


@pytest.fixture(scope="module")
def tokenizer(task):
    texts = [text for e in islice(task.train(5), 500) for text in (e.source, e.references.first())]
    return train_tokenizer(texts, 300, 512)


def test_tokenizer_round_trip(task, tokenizer):
    answers = [example.references.first() for example in task.test()[:100]]
    assert decode_answers(tokenizer, encode_answers(tokenizer, answers)) == answers


def test_digits_are_single_tokens(tokenizer):
    ids = encode_prompts(tokenizer, ["347,812 cars"])[0]
    pieces = [tokenizer.decode([i]) for i in ids]
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == list("347812")


def test_saved_tokenizer_has_the_same_chat_template(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert encode_prompts(loaded, ["At 2:30 pm."]) == encode_prompts(tokenizer, ["At 2:30 pm."])
    text = loaded.decode(encode_prompts(loaded, ["At 2:30 pm."])[0])
    assert text == "<|user|>At 2:30 pm.<|assistant|>"
    assert loaded.eos_token == "<|end|>"


def test_reserved_rows_lie_behind_the_tokenizer(tokenizer, tmp_path):
    model = new_model(SHAPE, tokenizer, 0)
    save_model(model, tokenizer, tmp_path)
    reserved = reserved_rows(load_model(tmp_path), tokenizer)
    assert (reserved.start, reserved.end) == (300, 332)


def test_batch_marks_what_predicts_the_answer():
    batch = Batch.of([[5, 6], [7]], [[1, 2], [3, 4]], pad=0)
    assert batch.targets.tolist() == [1, 2, 3, 4]
    assert batch.answer[0].nonzero().squeeze(1).tolist() == [1, 2]
    assert batch.answer[1].nonzero().squeeze(1).tolist() == [0, 1]


class Killed(Exception):
    pass


def run(tokenizer, task, directory, kill_at=None):
    model = new_model(SHAPE, tokenizer, 0)
    method = SFT(SFTConfig(type="sft"), len(tokenizer), None)
    batches = Demonstrations(task, tokenizer, 4, seed=0)
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += 1
        if calls == kill_at:
            raise Killed
        return method.loss(model, batch)

    schedule = Schedule(
        steps=8, batch=4, learning_rate=1e-2, warmup=2, checkpoint_every=3, log_every=1, compile=False
    )
    train(model, loss, batches, schedule, directory)
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return model, [(line["step"], line["loss"]) for line in lines]


def test_a_killed_run_repeats_itself_exactly(task, tokenizer, tmp_path):
    straight, curve = run(tokenizer, task, tmp_path / "straight")
    with pytest.raises(Killed):
        run(tokenizer, task, tmp_path / "killed", kill_at=6)  # after the checkpoint of step 3
    resumed, resumed_curve = run(tokenizer, task, tmp_path / "killed")
    assert [step for step, _ in curve] == list(range(1, 9))
    assert curve[-1][1] < curve[0][1]
    assert resumed_curve == curve
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_teacher_equal_to_student_gives_zero_loss_and_gradient(task, tokenizer):
    student, teacher, other = (new_model(SHAPE, tokenizer, seed) for seed in (0, 0, 1))
    batch = Demonstrations(task, tokenizer, 4, seed=0)[0]
    loss, _ = KD(KDConfig(type="kd"), len(tokenizer), teacher).loss(student, batch)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert max(p.grad.abs().max().item() for p in student.parameters()) < 1e-6
    assert KD(KDConfig(type="kd"), len(tokenizer), other).loss(student, batch)[0].item() > 1e-3


def test_forward_kl_by_hand():
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    expected = 0.25 * torch.tensor(0.5).log() + 0.75 * torch.tensor(1.5).log()
    assert forward_kl(student, teacher).item() == pytest.approx(expected.item(), abs=1e-6)


def test_reserved_rows_get_no_gradient_from_the_answers(task, tokenizer):
    model = new_model(SHAPE, tokenizer, 0)
    SFT(SFTConfig(type="sft"), len(tokenizer), None).loss(model, Demonstrations(task, tokenizer, 4, 0)[0])[
        0
    ].backward()
    gradient = model.get_output_embeddings().weight.grad
    assert gradient[:300].abs().sum() > 0
    assert gradient[300:].abs().sum() == 0


def test_a_method_without_its_teacher_is_refused():
    with pytest.raises(ValueError, match="needs a teacher"):
        KD(KDConfig(type="kd"), 300, None)


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
router: {span_tokens: 1, ask_tokens: 1, gain: excess}
"""
    )
    return path


def test_overrides(recipe):
    loaded = load_recipe(recipe, ["teacher.schedule.steps=7", "router.gain=kl"])
    assert (loaded.teacher.schedule.steps, loaded.router.gain) == (7, "kl")


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
