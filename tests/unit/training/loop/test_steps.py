"""One step of training: draws and their lengths, refusals, and the weights that are kept."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.numbers import tokenizer_of_numbers
from training.batches import Batch, Demonstrations
from training.loop import trackers
from training.loop.progress import Log
from training.loop.trainer import make_optimizers, train, unchanged, update
from training.lora import add_lora
from training.method_config import GKDConfig, KDConfig, Schedule, SFTConfig
from training.methods import GKD, KD, SFT, SeqKD
from training.model_config import LoraConfig, Shape
from training.models import new_model
from training.sampling import complete, sampled
from training.tasks import make_task

torch.set_num_threads(1)
SHAPE = Shape(hidden=32, layers=1, heads=1, feed_forward=32)
BATCH = Batch.of([[5, 6], [7], [8, 9], [10]], [[1, 2], [3, 4], [5, 6], [7, 8]], pad=0)


@pytest.fixture(scope="module")
def task():
    return make_task("numbers")


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of_numbers()


def schedule(**settings):
    usual = {"steps": 8, "batch": 4, "learning_rate": 1e-2, "warmup": 0, "log_every": 1, "compile": False}
    return Schedule(**(usual | settings))


def losses(directory):
    lines = (directory / "log.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def failing(method, at, value):
    """The method's loss, multiplied by `value` at its call number `at`."""
    calls = []

    def loss(model, batch):
        calls.append(batch)
        plain, metrics = method.loss(model, batch)
        return (plain * value if len(calls) == at else plain), metrics

    return loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_before_its_step(task, tokenizer, tmp_path, value):
    def run(directory, loss):
        model = new_model(SHAPE, tokenizer, 0)
        batches = Demonstrations(task, tokenizer, 4, seed=0)
        train(model, loss, batches, schedule(checkpoint_every=2), directory)
        return model

    method = SFT(SFTConfig(type="sft"), len(tokenizer), None)
    straight = run(tmp_path / "straight", method.loss)
    with pytest.raises(FloatingPointError, match=r"bad: step 6: the loss is (nan|inf), the norm .* nan"):
        run(tmp_path / "bad", failing(method, 6, value))
    saved = torch.load(tmp_path / "bad" / "checkpoint.pt")
    assert saved["step"] == 4
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())
    resumed = run(tmp_path / "bad", method.loss)
    assert losses(tmp_path / "bad") == losses(tmp_path / "straight")
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_a_step_that_is_refused_leaves_the_weights_alone(tokenizer):
    model = new_model(SHAPE, tokenizer, 0)
    before = [p.detach().clone() for p in model.parameters()]
    method = SFT(SFTConfig(type="sft"), len(tokenizer), None)
    settings = schedule(accumulate=2)
    with pytest.raises(FloatingPointError, match=r"step 1: the loss is [0-9.]+, nan"):
        update(
            model,
            failing(method, 2, math.nan),
            unchanged,
            make_optimizers(model, settings),
            BATCH,
            0,
            settings,
            0,
        )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_own_completions_are_drawn_once_a_step(tokenizer, accumulate):
    drawn = []

    def prepare(model, batch):
        drawn.append(sampled(model, batch, len(tokenizer), tokenizer.eos_token_id, longest=9))
        return drawn[-1]

    model = new_model(SHAPE, tokenizer, 0)
    method = SFT(SFTConfig(type="sft"), len(tokenizer), None)
    settings = schedule(accumulate=accumulate)
    metrics, positions = update(
        model, method.loss, prepare, make_optimizers(model, settings), BATCH, 0, settings, 0
    )
    (batch,) = drawn
    assert batch.prompts() == BATCH.prompts()
    assert positions == batch.positions
    assert float(metrics["loss"]) == pytest.approx(
        method.loss(new_model(SHAPE, tokenizer, 0), batch)[0].item()
    )


def test_own_completions_are_as_long_as_the_recipe_allows(tokenizer):
    """They may be longer than the longest reference, but never longer than the context."""
    model = new_model(SHAPE, tokenizer, 0)
    teacher = new_model(SHAPE, tokenizer, 1)
    config = GKDConfig(type="gkd", on_policy=1.0)
    for method in (
        GKD(config, len(tokenizer), teacher, 299, longest=20),
        SeqKD(SimpleNamespace(temperature=1.0), len(tokenizer), teacher, 299, longest=20),
    ):
        torch.manual_seed(0)
        counts = method.prepare(model, BATCH).answer.sum(1)
        assert counts.max() == 20 > BATCH.answer.sum(1).max()
    short = new_model(SHAPE.model_copy(update={"context": 12}), tokenizer, 0)
    for prepared in (
        GKD(config, len(tokenizer), teacher, 299, longest=20).prepare(short, BATCH),
        SeqKD(SimpleNamespace(temperature=1.0), len(tokenizer), teacher, 299, 20).prepare(short, BATCH),
        sampled(short, BATCH, len(tokenizer), 299),
    ):
        assert prepared.answer.sum(1).max() == 10


@pytest.mark.parametrize("kind", ["adapters", "blocks"])
def test_own_completions_are_drawn_without_dropout(tokenizer, kind):
    model = new_model(SHAPE, tokenizer, 0)
    if kind == "adapters":
        add_lora(model, LoraConfig(rank=4, dropout=0.9))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    else:
        model.config.attention_dropout = 0.9
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.9
    prompts = BATCH.prompts()
    expected = complete(model.eval(), prompts, len(tokenizer), 299, 12, temperature=0)
    model.train()
    assert complete(model, prompts, len(tokenizer), 299, 12, temperature=0) == expected
    assert model.training
    assert all(module.training for module in model.modules())


def test_a_temperature_softens_both_models_and_keeps_the_size_of_gradients(tokenizer):
    student, teacher = (new_model(SHAPE, tokenizer, seed) for seed in (0, 1))
    visible = len(tokenizer)
    log_pi, log_p = (
        model(BATCH.ids).logits[BATCH.answer][:, :visible].div(2).log_softmax(-1)
        for model in (student, teacher)
    )
    forward = 4 * (log_p.exp() * (log_p - log_pi)).sum(-1).mean()
    reverse = 4 * (log_pi.exp() * (log_pi - log_p)).sum(-1).mean()
    kd = KD(KDConfig(type="kd", temperature=2), visible, teacher)
    assert kd.loss(student, BATCH)[0].item() == pytest.approx(forward.item(), rel=1e-3)
    gkd = GKD(GKDConfig(type="gkd", beta=1, temperature=2), visible, teacher)
    assert gkd.loss(student, BATCH)[0].item() == pytest.approx(reverse.item(), rel=1e-3)


class Scripted:
    """Validations with given scores, which remember the weights that they saw."""

    def __init__(self, *qualities):
        self.qualities, self.seen = list(qualities), []

    def __call__(self, model):
        self.seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return {"valid_quality": self.qualities[len(self.seen) - 1], "valid_similarity": 0.0}


def train_with(validate, tokenizer, task, directory, **settings):
    model = new_model(SHAPE, tokenizer, 0)
    method = SFT(SFTConfig(type="sft"), len(tokenizer), None)
    batches = Demonstrations(task, tokenizer, 4, seed=0)
    train(model, method.loss, batches, schedule(**settings), directory, validate=validate)
    return model


def same(model, weights):
    return all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_the_best_validations_weights_are_kept(task, tokenizer, tmp_path):
    validate = Scripted(0.1, 0.7, 0.7, 0.3)
    model = train_with(validate, tokenizer, task, tmp_path, validate_every=2, keep="best")
    assert same(model, validate.seen[1])
    assert [file.name for file in tmp_path.glob("best-*")] == ["best-4.pt"]
    last = train_with(
        validate := Scripted(0.1, 0.7, 0.7, 0.3), tokenizer, task, tmp_path / "b", validate_every=2
    )
    assert same(last, validate.seen[3])


def test_training_ends_when_validations_get_no_better(task, tokenizer, tmp_path):
    settings = {"validate_every": 1, "patience": 2, "keep": "best"}
    validate = Scripted(0.1, 0.5, 0.4, 0.5)
    model = train_with(validate, tokenizer, task, tmp_path, **settings)
    assert len(validate.seen) == 4
    assert same(model, validate.seen[1])
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 4
    again = train_with(Scripted(), tokenizer, task, tmp_path, **settings)  # it is at its end already
    assert same(again, validate.seen[1])


class Dies(Scripted):
    """Validations whose last one raises."""

    def __call__(self, model):
        if len(self.seen) == len(self.qualities):
            raise KeyboardInterrupt
        return super().__call__(model)


def test_the_best_weights_survive_a_kill(task, tokenizer, tmp_path):
    """The run is killed after a better validation that no checkpoint knows yet."""
    settings = {"validate_every": 1, "keep": "best", "checkpoint_every": 2}
    first = Dies(0.1, 0.5, 0.9)
    with pytest.raises(KeyboardInterrupt):
        train_with(first, tokenizer, task, tmp_path, **settings)
    second = Scripted(0.2, 0.3, 0.3, 0.3, 0.3, 0.3)  # step 3 is validated again, and is no better this time
    model = train_with(second, tokenizer, task, tmp_path, **settings)
    assert same(model, first.seen[1])


@pytest.mark.parametrize("setting", [{"keep": "best"}, {"patience": 3}])
def test_settings_that_need_validations_are_refused_without_them(setting):
    with pytest.raises(ValueError, match="need validate_every"):
        schedule(**setting)


def test_wandb_is_one_tracker_of_several(tmp_path, monkeypatch):
    told = []
    run = SimpleNamespace(log=lambda *a, **k: told.append((a, k)), finish=lambda: told.append("finished"))
    wandb = SimpleNamespace(init=lambda **settings: told.append(settings["resume"]) or run)
    monkeypatch.setattr(trackers.importlib, "import_module", lambda name: wandb)
    with Log(tmp_path / "student", 0, ("wandb",)) as log:
        log.write(3, {"loss": 0.5})
    assert told == ["allow", (({"loss": 0.5},), {"step": 3}), "finished"]
    assert json.loads((tmp_path / "student" / "log.jsonl").read_text()) == {"step": 3, "loss": 0.5}
    assert not (tmp_path / "student" / "tensorboard").exists()


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(trackers.TrackerError, match="pip install wandb"):
        trackers.check_trackers(["wandb"])
    trackers.check_trackers(["tensorboard"])
