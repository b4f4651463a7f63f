"""Tokenizer, batches and trainer: round trips, and a killed run that repeats itself exactly."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from transformers import PretrainedConfig

from tests.helpers.killing import Killed, killing
from tests.helpers.numbers import tokenizer_of_numbers
from training.batches import Batch, Demonstrations
from training.loop.stopping import Stopped
from training.loop.trainer import train
from training.loop.validation import Validation
from training.method_config import GKDConfig, KDConfig, PCLConfig, Schedule, SFTConfig
from training.methods import GKD, KD, PCL, SFT
from training.model_config import Shape
from training.models import load_model, new_model, reserved_rows, save_model
from training.sampling import sampled, until_end
from training.tasks import make_task
from training.tokenizer import decode_answers, encode_answers, encode_prompts, load_tokenizer

torch.set_num_threads(1)  # tiny models: threads only wait for each other

SHAPE = Shape(hidden=32, layers=1, heads=1, feed_forward=32)


@pytest.fixture(scope="module")
def task():
    return make_task("numbers")


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of_numbers()


def test_the_tokenizer_decodes_what_it_encodes(task, tokenizer):
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


def test_reserved_rows_come_after_the_tokenizers_ids(tokenizer, tmp_path):
    model = new_model(SHAPE, tokenizer, 0)
    save_model(model, tokenizer, tmp_path)
    reserved = reserved_rows(load_model(tmp_path), tokenizer)
    assert (reserved.start, reserved.end) == (300, 332)


def test_a_batch_marks_the_positions_that_predict_the_answer():
    batch = Batch.of([[5, 6], [7]], [[1, 2], [3, 4]], pad=0)
    assert batch.targets.tolist() == [1, 2, 3, 4]
    assert batch.answer[0].nonzero().squeeze(1).tolist() == [1, 2]
    assert batch.answer[1].nonzero().squeeze(1).tolist() == [0, 1]


def test_examples_longer_than_the_context_are_left_out(task, tokenizer):
    def lengths(longest):
        batches = Demonstrations(task, tokenizer, 2, seed=0, longest=longest)
        return [int(row.nonzero().max()) + 2 for step in range(64) for row in batches[step].answer]

    short = lengths(60)
    assert max(short) <= 60 < max(lengths(None))
    assert len(short) == 2 * 64
    with pytest.raises(ValueError, match="at most 9 tokens"):
        Demonstrations(task, tokenizer, 1, seed=0, longest=9)[0]


def run(tokenizer, task, directory, kill_at=None):
    model = new_model(SHAPE, tokenizer, 0)
    method = SFT(SFTConfig(type="sft"), len(tokenizer), None)
    batches = Demonstrations(task, tokenizer, 4, seed=0)
    schedule = Schedule(
        steps=8, batch=4, learning_rate=1e-2, warmup=2, checkpoint_every=3, log_every=1, compile=False
    )
    train(model, killing(method.loss, kill_at), batches, schedule, directory)
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


def test_sigterm_ends_the_step_and_leaves_a_checkpoint(task, tokenizer, tmp_path, monkeypatch):
    _, curve = run(tokenizer, task, tmp_path / "straight")
    plain = SFT.loss
    calls = []

    def loss(self, model, batch):
        calls.append(batch)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(SFT, "loss", loss)
        with pytest.raises(Stopped, match="after step 5 of 8"):
            run(tokenizer, task, tmp_path / "stopped")
    assert torch.load(tmp_path / "stopped" / "checkpoint.pt")["step"] == 5
    assert run(tokenizer, task, tmp_path / "stopped")[1] == curve


def test_dropout_is_for_passes_with_a_gradient_alone(tokenizer):
    plain, model = (
        new_model(SHAPE, tokenizer, 0),
        new_model(SHAPE.model_copy(update={"dropout": 0.5}), tokenizer, 0),
    )
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {
        k: v.tolist() for k, v in plain.state_dict().items()
    }
    ids = torch.arange(12)[None]
    assert not torch.allclose(model.train()(ids).logits, plain(ids).logits, atol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    torch.testing.assert_close(model.eval()(ids).logits, plain(ids).logits)


def test_validation_scores_greedy_completions(task, tokenizer):
    example = task.valid()[0]
    answer = encode_answers(tokenizer, [example.references.first()])[0]

    class Knows(torch.nn.Module):
        """A model that writes the right answer to every prompt."""

        device = torch.device("cpu")
        config = PretrainedConfig(max_position_embeddings=512)

        def __init__(self):
            super().__init__()
            self.head = torch.nn.Identity()

        def get_output_embeddings(self):
            return self.head

        def forward(self, input_ids, attention_mask, **others):
            width = attention_mask.shape[1] - self.prompt
            logits = torch.zeros(len(input_ids), input_ids.shape[1], len(tokenizer))
            logits[:, -1, answer[width]] = 1.0
            return SimpleNamespace(logits=self.head(logits))

    model = Knows()
    model.prompt = len(encode_prompts(tokenizer, [example.source])[0])
    validation = Validation(task, tokenizer, examples=1, longest=len(answer) + 5)
    assert validation(model) == {"valid_quality": 1.0, "valid_similarity": 1.0}


DISTILLATIONS = [
    (KD, KDConfig(type="kd")),
    (GKD, GKDConfig(type="gkd", beta=1.0, on_policy=1.0)),
    (GKD, GKDConfig(type="gkd", beta=0.5, on_policy=0.0)),
    (PCL, PCLConfig(type="pcl", window=0, on_policy=0.0)),
    (PCL, PCLConfig(type="pcl", window=3, on_policy=1.0)),
]


@pytest.mark.parametrize(("method", "config"), DISTILLATIONS)
def test_teacher_equal_to_student_gives_zero_loss_and_gradient(task, tokenizer, method, config):
    student, teacher, other = (new_model(SHAPE, tokenizer, seed) for seed in (0, 0, 1))
    batch = Demonstrations(task, tokenizer, 4, seed=0)[0]
    end = tokenizer.eos_token_id
    loss, _ = method(config, len(tokenizer), teacher, end).loss(student, batch)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert max(p.grad.abs().max().item() for p in student.parameters()) < 1e-5
    assert method(config, len(tokenizer), other, end).loss(student, batch)[0].item() > 1e-3


def test_sampled_completions_keep_their_prompts_and_end_once(task, tokenizer):
    batch = Demonstrations(task, tokenizer, 6, seed=0)[0]
    end = tokenizer.eos_token_id
    torch.manual_seed(0)
    drawn = sampled(new_model(SHAPE, tokenizer, 0), batch, len(tokenizer), end)
    for before, after in zip(batch.answer, drawn.answer, strict=True):
        assert before.int().argmax() == after.int().argmax()
    start = int(batch.answer[0].int().argmax()) + 1
    assert torch.equal(batch.ids[0, :start], drawn.ids[0, :start])
    assert drawn.ids.max() < len(tokenizer)
    assert until_end([5, end, 7, end], end) == [5, end]
    assert until_end([5, 7], end) == [5, 7]


def test_reserved_rows_get_no_gradient_from_the_answers(task, tokenizer):
    model = new_model(SHAPE, tokenizer, 0)
    SFT(SFTConfig(type="sft"), len(tokenizer), None).loss(model, Demonstrations(task, tokenizer, 4, 0)[0])[
        0
    ].backward()
    gradient = model.get_output_embeddings().weight.grad
    assert gradient[:300].abs().sum() > 0
    assert gradient[300:].abs().sum() == 0
