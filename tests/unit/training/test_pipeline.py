"""Stages are done once, by one recipe. Exports are complete and are the trained model. The hub comes last."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, PhiConfig

from router.checkpoint import RouterCheckpoint
from tests.helpers.commands import INTERRUPTED, train
from tests.helpers.numbers import save_untrained_pair, tokenizer_of_numbers
from tests.helpers.recipes import SCHEDULE, write_recipe
from training import cli, export, pipeline
from training.config import load_recipe
from training.gating.validation import GateValidation
from training.hub import HubError, check_hub, push
from training.loop import trainer
from training.lora import LoraError, add_lora, merged
from training.model_config import LoraConfig, Shape
from training.models import new_model, save_model

torch.set_num_threads(1)
ROWS = 96


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of_numbers()


@pytest.fixture(scope="module")
def ready(tokenizer, tmp_path_factory):
    """A directory with untrained models `teacher`, `student` and `gpt2`."""
    directory = tmp_path_factory.mktemp("ready")
    save_untrained_pair(tokenizer, directory)
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=332, n_embd=32, n_layer=2, n_head=2, n_positions=512, bos_token_id=1)
    config.eos_token_id = tokenizer.eos_token_id
    save_model(AutoModelForCausalLM.from_config(config), tokenizer, directory / "gpt2")
    return directory


def recipe_in(directory, ready):
    student = {"pretrained": f"{ready}/student", "method": {"type": "kd"}, "schedule": SCHEDULE}
    return write_recipe(directory, ready, student=student)


@pytest.fixture
def recipe(ready, tmp_path):
    return recipe_in(tmp_path, ready)


STUDENT = ["--stage", "student"]


@pytest.fixture(scope="module")
def trained(ready, tmp_path_factory):
    """A directory with a recipe, and the files that training its student has left."""
    directory = tmp_path_factory.mktemp("trained")
    assert train([recipe_in(directory, ready), *STUDENT]) == 0
    return directory


@pytest.fixture
def done(trained, recipe, tmp_path):
    """A recipe whose student has been trained."""
    for name in ("out", "work"):
        shutil.copytree(trained / name, tmp_path / name, symlinks=True)
    return recipe


def student_of(tmp_path):
    return load_file(tmp_path / "out" / "student" / "model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_layers_that_are_computed_twice_learn_the_same(done, tmp_path):
    before = student_of(tmp_path)
    assert train([done, *STUDENT, "--restart", "student.schedule.gradient_checkpointing=true"]) == 0
    after = student_of(tmp_path)
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=1e-5, rtol=1e-4)


def test_examples_longer_than_the_recipe_allows_are_not_trained_on(recipe, tmp_path, capsys):
    longest = 120
    loaded = load_recipe(Path(recipe), [f"max_length={longest}", "student.method.type=sft"])
    space = pipeline.Workspace(loaded)
    task = pipeline.task_of(loaded)
    pipeline.make_model(space, "teacher", task, tokenizer_of_numbers())
    batch = pipeline.make_job(space, "student", task, tokenizer_of_numbers()).batches[0]
    assert len(batch.ids) == 2
    assert all(
        len(row) + answer <= longest for row, answer in zip(batch.prompts(), batch.answer.sum(1), strict=True)
    )
    assert train([recipe, *STUDENT, "max_length=3"]) == 2
    assert "too few examples have at most 3 tokens" in capsys.readouterr().err


def test_prompts_without_answers_train_a_student_that_learns_from_its_teacher(recipe, tmp_path, capsys):
    for split in ("train", "valid", "test"):
        lines = [json.dumps({"source": f"{split} {number}"}) + "\n" for number in range(8)]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    judged = f"task={{name: jsonl, options: {{directory: {tmp_path}, judge: 'operator:ne'}}}}"
    assert train([recipe, *STUDENT, judged]) == 2
    assert "student.method kd: some examples have no answer" in capsys.readouterr().err
    assert train([recipe, judged, "max_tokens=4", "student.method.type=seqkd"]) == 0
    assert (tmp_path / "out" / "router" / "router.json").exists()


@pytest.mark.parametrize(
    ("judged", "objective"), [((1, 2), "constrained"), ((2, 1), "difference")], ids=["policy", "regression"]
)
def test_router_json_names_the_objective_of_the_exported_round(
    recipe, tmp_path, monkeypatch, judged, objective
):
    scores = iter(judged)
    monkeypatch.setattr(GateValidation, "judged", lambda validation, gate: next(scores))
    constrained = ["router.objective={type: constrained}", "router.rounds=2"]
    assert train([recipe, *constrained]) == 0
    training = RouterCheckpoint.load(tmp_path / "out" / "router").config.training
    assert training["objective"] == objective


def test_an_exported_stage_of_another_recipe_is_named_and_kept(done, tmp_path, capsys):
    before = student_of(tmp_path)
    capsys.readouterr()
    assert train([done, *STUDENT, "student.schedule.steps=3", "student.method.temperature=2.0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "student: the recipe has changed since" in line
    assert "method.temperature 1.0, now 2.0; schedule.steps 6, now 3; --restart" in line
    assert equal(student_of(tmp_path), before)


def test_settings_that_do_not_change_the_result_do_not_change_the_run(done, tmp_path):
    same = ["student.schedule.log_every=3", "student.schedule.accumulate=2", "max_tokens=32", "threads=1"]
    assert train([done, *STUDENT, *same]) == 0


def test_a_restart_begins_anew(done, tmp_path):
    before = student_of(tmp_path)
    assert train([done, *STUDENT, "--restart", "seed=7"]) == 0
    assert not equal(student_of(tmp_path), before)
    assert json.loads((tmp_path / "out" / "student" / "recipe.json").read_text())["seed"] == 7
    assert train([done, *STUDENT, "seed=7"]) == 0


def test_a_restart_with_an_unusable_recipe_deletes_nothing(done, tmp_path):
    before = student_of(tmp_path)
    assert train([done, *STUDENT, "--restart", "student.schedule.accumulate=3"]) == 2
    assert equal(student_of(tmp_path), before)


@pytest.fixture
def interrupted(recipe, monkeypatch):
    """A run that ended after the checkpoint of step 2."""
    save = trainer.save

    def dies(directory, step, *state):
        save(directory, step, *state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save", dies)
        assert train([recipe, *STUDENT]) == INTERRUPTED
    return recipe


def test_a_checkpoint_of_another_recipe_is_not_continued(interrupted, capsys):
    capsys.readouterr()
    assert train([interrupted, *STUDENT, "student.schedule.learning_rate=0.5"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "schedule.learning_rate 0.01, now 0.5" in line
    assert train([interrupted, *STUDENT]) == 0


def test_a_run_may_be_prolonged_before_its_decay(interrupted, tmp_path, capsys):
    assert train([interrupted, *STUDENT, "student.schedule.steps=8"]) == 0
    assert torch.load(tmp_path / "work" / "student" / "checkpoint.pt")["step"] == 8


def test_a_run_may_not_be_prolonged_during_its_decay(interrupted, capsys):
    assert train([interrupted, *STUDENT, "student.schedule.steps=3"]) == 2
    assert "schedule.steps 6, now 3" in capsys.readouterr().err


def test_another_ready_teacher_is_noticed(done, ready, capsys):
    assert train([done, *STUDENT, f"teacher.pretrained={ready}/gpt2"]) == 2
    assert f"teacher: the recipe has changed: {done[:-12]}/out/teacher is" in capsys.readouterr().err


def test_a_teacher_that_was_put_there_needs_the_vocabulary_of_the_recipe(recipe, ready, tmp_path, capsys):
    """A tokenizer that is trained anew, for example with another seed, gives the ids other texts."""
    shutil.copytree(ready / "teacher", tmp_path / "out" / "teacher")
    shape = "shape: {hidden: 32, layers: 2, heads: 1, feed_forward: 32}"
    model = f"{{{shape}, method: {{type: sft}}, schedule: {{steps: 1, batch: 2, learning_rate: 1e-2}}}}"
    other = [
        f"teacher={model}",
        f"student={model.replace('sft', 'kd')}",
        "tokenizer={size: 300, examples: 50}",
    ]
    assert train([recipe, *STUDENT, *other]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"out/teacher has a different vocabulary from {tmp_path}/work/tokenizer: " in error


def test_a_router_of_another_recipe_or_student_is_noticed(recipe, ready, tmp_path, tokenizer, capsys):
    pair = [recipe, f"student={{pretrained: {ready}/student}}"]
    assert train(pair) == 0
    assert train(pair) == 0
    assert train([*pair, "router.prompts=9"]) == 2
    assert "router: the recipe has changed" in capsys.readouterr().err
    other = new_model(Shape(hidden=32, layers=2, heads=1, feed_forward=32), tokenizer, 9)
    other.save_pretrained(tmp_path / "out" / "student")
    assert train(pair) == 2
    assert "--restart --stage router" in capsys.readouterr().err
    assert train([*pair, "--restart", "--stage", "router"]) == 0
    RouterCheckpoint.load(tmp_path / "out" / "router").check_student(tmp_path / "out" / "student")


def test_a_kill_while_exporting_leaves_no_half_export(recipe, tmp_path, monkeypatch):
    def dies(model, tokenizer, directory):
        (directory / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export, "save_model", dies)
        assert train([recipe, *STUDENT]) == INTERRUPTED
    assert not (tmp_path / "out" / "student").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["teacher"]
    assert train([recipe, *STUDENT]) == 0
    assert {"config.json", "model.safetensors", "recipe.json"} <= {
        path.name for path in (tmp_path / "out" / "student").iterdir()
    }


def test_an_export_that_is_another_model_is_refused(recipe, tmp_path, monkeypatch, capsys):
    def wrong(weights, model):
        return {name: tensor * 1.5 for name, tensor in merged(weights, model).items()}

    monkeypatch.setattr(export, "merged", wrong)
    assert train([recipe, *STUDENT]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not give the trained model's logits" in line
    assert not (tmp_path / "out" / "student").exists()


USUAL = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
GPT2 = GPT2Config(vocab_size=ROWS, n_embd=32, n_layer=2, n_head=2, n_positions=128, eos_token_id=1)


def fresh(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (LlamaConfig(**USUAL, tie_word_embeddings=True), "all-linear"),
        (LlamaConfig(**USUAL), ("lm_head", "q_proj")),
        (LlamaConfig(**USUAL), ("embed_tokens",)),
        (GPT2, "all-linear"),
        (GPT2, ("attn.c_proj",)),
        (GPT2, ("wpe", "mlp.c_fc")),
        (PhiConfig(**USUAL), ("lm_head", "dense")),
    ],
)
def test_merged_adapters_are_those_that_were_trained(config, targets):
    model = fresh(config)
    add_lora(model, LoraConfig(rank=4, targets=targets, dropout=0.5))
    model.eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    plain = fresh(config)
    ids = torch.arange(2, 22)[None]
    trained, before = model(ids).logits, plain(ids).logits
    plain.load_state_dict(merged(model.state_dict(), model))
    assert (trained - before).abs().max() > 0.3
    torch.testing.assert_close(plain(ids).logits, trained, atol=1e-4, rtol=1e-4)
    for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
        layer.merge()  # by peft itself
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "targets", "named"),
    [
        (LlamaConfig(**USUAL, tie_word_embeddings=True), ("lm_head",), "lm_head shares its weight"),
        (LlamaConfig(**USUAL, tie_word_embeddings=True), ("embed_tokens",), "embed_tokens shares its weight"),
        (GPT2, ("wte",), "transformer.wte shares its weight"),
        (LlamaConfig(**USUAL), ("nosuch",), "LlamaForCausalLM has no module named nosuch"),
        (LlamaConfig(**USUAL), ("q_proj", "nosuch"), "no module named nosuch"),
        (LlamaConfig(**USUAL), ("norm",), "model.norm is a LlamaRMSNorm"),
        (LlamaConfig(**USUAL), ("self_attn",), "self_attn is a LlamaAttention"),
        (
            MixtralConfig(**USUAL, num_local_experts=2, num_experts_per_tok=1),
            "all-linear",
            "cannot be merged",
        ),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(config, targets, named):
    with pytest.raises(LoraError, match=f"lora.targets: .*({named})"):
        add_lora(fresh(config), LoraConfig(rank=4, targets=targets))


@pytest.mark.parametrize("targets", ["[lm_head]", "[nosuch]", "[norm]"])
def test_unusable_adapters_are_refused_before_anything_is_trained(recipe, tmp_path, capsys, targets):
    lora = f"student.lora={{rank: 4, targets: {targets}}}"
    assert train([recipe, *STUDENT, lora]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("wheels train: student.lora.targets: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("targets", ["all-linear", "[attn.c_proj]"])
def test_adapters_of_gpt2_are_trained_and_exported(recipe, ready, tmp_path, targets):
    """GPT-2's matrices are stored transposed."""
    lora = f"student.lora={{rank: 4, targets: {targets}}}"
    assert train([recipe, *STUDENT, f"student.pretrained={ready}/gpt2", lora]) == 0
    before, after = load_file(ready / "gpt2" / "model.safetensors"), student_of(tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.endswith(".weight") and ".c_" in name for name in changed)


def test_a_model_that_cannot_be_asked_by_tokens_is_refused(recipe, monkeypatch, capsys):
    build = pipeline.build

    def strange(*arguments):
        model = build(*arguments)
        model.get_output_embeddings().register_forward_hook(lambda head, inputs, logits: logits.sin())
        return model

    monkeypatch.setattr(pipeline, "build", strange)
    assert train([recipe, *STUDENT]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    problem = "LlamaForCausalLM computes its logits in a way that a router cannot follow"
    assert line == f"wheels train: student: {problem}"


def test_a_temperature_is_not_for_a_served_teacher(recipe, capsys):
    served = ["teacher={url: 'http://127.0.0.1:9'}", "student.method.temperature=2", *STUDENT]
    assert train([recipe, *served]) == 2
    assert "student.method.temperature other than 1" in capsys.readouterr().err


class Hub:
    """A stand-in for the part of HfApi that is used."""

    def __init__(self, problem=None):
        self.problem, self.repositories, self.folders = problem, [], []

    def whoami(self):
        if self.problem:
            raise self.problem

    def create_repo(self, name, private, exist_ok):
        self.repositories.append((name, private, exist_ok))

    def upload_folder(self, repo_id, folder_path):
        self.folders.append((repo_id, folder_path.name))


def test_a_pair_is_pushed_at_the_end(recipe, monkeypatch, capsys):
    hub = Hub()
    monkeypatch.setattr(cli, "HfApi", lambda: hub)
    assert train([recipe, *STUDENT, "--push-to-hub", "me/mine"]) == 0
    assert hub.repositories == [("me/mine-student", True, True)]
    assert hub.folders == [("me/mine-student", "student")]
    assert "pushed to me/mine-student" in capsys.readouterr().out


def test_a_hub_that_cannot_be_reached_is_noticed_before_training(recipe, tmp_path, monkeypatch, capsys):
    hub = Hub(problem=ConnectionError("offline mode is enabled"))
    monkeypatch.setattr(cli, "HfApi", lambda: hub)
    assert train([recipe, *STUDENT, "--push-to-hub", "me/mine"]) == 2
    assert capsys.readouterr().err == "wheels train: --push-to-hub me/mine: offline mode is enabled\n"
    assert not (tmp_path / "work").exists()


def test_names_that_the_hub_cannot_have_are_refused():
    for name in ("mine", "a/b/c", "me/mi ne"):
        with pytest.raises(HubError, match=f"--push-to-hub {name}: "):
            check_hub(name, SimpleNamespace())


def test_nothing_to_push_is_an_error(tmp_path):
    with pytest.raises(HubError, match="neither a student nor a router"):
        push(tmp_path, "me/mine", Hub())
