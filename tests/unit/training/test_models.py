"""Ready pairs: checked before any compute is spent, trained in whole or by adapters, exported plainly."""

import json
import logging
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from router.checkpoint import RouterCheckpoint
from router.reserved import RESERVED_ROWS
from router.vocabulary import OTHER_SPLIT
from tests.helpers.commands import INTERRUPTED, train
from tests.helpers.recipes import SCHEDULE, write_recipe
from training.gating.rollout import Request
from training.gating.router_stage import FrozenPair
from training.model_config import Shape
from training.models import new_model, reserved_rows, save_model
from training.sampling import complete
from training.tokenizer import load_tokenizer
from training.vocabulary import check_vocabulary

torch.set_num_threads(1)


@pytest.fixture
def recipe(untrained_pair, tmp_path):
    student = {
        "pretrained": f"{untrained_pair}/student",
        "lora": {"rank": 4},
        "method": {"type": "gkd", "on_policy": 0.5},
        "schedule": SCHEDULE,
    }
    return write_recipe(tmp_path, untrained_pair, student=student)


def losses(directory):
    lines = map(json.loads, (directory / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines]


def test_an_adapter_is_trained_resumed_and_merged(untrained_pair, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("training.batches.SHARD_BATCHES", 64)  # as usual: the batches show that it learns
    students = ["--stage", "student", "student.schedule.batch=4"]
    assert train([recipe, *students]) == 0
    straight = losses(tmp_path / "work" / "student")
    assert straight[-1] < straight[0]

    before = load_file(untrained_pair / "student" / "model.safetensors")
    merged = load_file(tmp_path / "out" / "student" / "model.safetensors")
    assert merged.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed == {name for name in before if "_proj" in name}
    assert (tmp_path / "out" / "teacher").resolve() == untrained_pair / "teacher"

    again = [recipe, f"output={tmp_path}/out2", f"work={tmp_path}/work2", *students]
    with monkeypatch.context() as patch:
        patch.setattr("training.loop.trainer.save", dies_after(4))
        assert train(again) == INTERRUPTED
    assert train(again) == 0
    assert losses(tmp_path / "work2" / "student") == straight
    assert merged.keys() == load_file(tmp_path / "out2" / "student" / "model.safetensors").keys()
    saved = torch.load(tmp_path / "work2" / "student" / "checkpoint.pt")["model"]
    assert all("lora_" in name for name in saved)


def dies_after(last):
    from training.loop.checkpoints import save

    def stand_in(directory, step, *state):
        save(directory, step, *state)
        if step == last:
            raise KeyboardInterrupt

    return stand_in


def test_a_router_over_a_ready_pair_that_is_not_trained(recipe, untrained_pair, tmp_path):
    assert train([recipe, f"student={{pretrained: {untrained_pair}/student}}"]) == 0
    router = RouterCheckpoint.load(tmp_path / "out" / "router")
    router.check_student(tmp_path / "out" / "student")
    assert router.reserved.start == 300


def test_a_teacher_that_needs_no_training_needs_no_stage(recipe, untrained_pair, tmp_path):
    assert train([recipe, "--stage", "student"]) == 0
    assert (tmp_path / "out" / "teacher").resolve() == untrained_pair / "teacher"


def test_a_missing_model_is_named(recipe, tmp_path, capsys):
    assert train([recipe, f"student={{pretrained: {tmp_path}/none}}"]) == 2
    assert f"no such directory, and not a name on the hub: {tmp_path}/none" in capsys.readouterr().err


def other_tokenizer(directory):
    vocabulary = {chr(33 + i): i for i in range(90)} | {"<|end|>": 90}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, merges=[])), eos_token="<|end|>"
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


def test_another_vocabulary_is_refused_by_name(recipe, untrained_pair, tmp_path, capsys):
    strange = tmp_path / "strange"
    tokenizer = other_tokenizer(strange)
    save_model(
        new_model(Shape(hidden=32, layers=1, heads=1, feed_forward=32), tokenizer, 0), tokenizer, strange
    )
    assert train([recipe, f"teacher.pretrained={strange}"]) == 2
    message = capsys.readouterr().err
    assert f"the teacher {strange} has a different vocabulary from {untrained_pair / 'student'}" in message
    assert not (tmp_path / "work").exists()


def test_a_teacher_that_splits_texts_otherwise_is_taken_with_a_warning(untrained_pair, tmp_path, capsys):
    """Its normaliser differs, but the ids do not, and the two models exchange only ids."""
    lower_case = Tokenizer.from_file(str(untrained_pair / "teacher" / "tokenizer.json"))
    lower_case.normalizer = normalizers.Lowercase()
    PreTrainedTokenizerFast(tokenizer_object=lower_case).save_pretrained(tmp_path)
    check_vocabulary("teacher", str(tmp_path), load_tokenizer(untrained_pair / "student"))
    (warning,) = capsys.readouterr().out.splitlines()
    assert warning.startswith(f"the teacher {tmp_path} {OTHER_SPLIT}: ")


def test_comparing_vocabularies_says_nothing_about_texts_that_a_model_could_not_read(untrained_pair, caplog):
    tokenizer = load_tokenizer(untrained_pair / "student")
    tokenizer.model_max_length = 8
    told = logging.getLogger("transformers")
    told.addHandler(caplog.handler)
    try:
        check_vocabulary("teacher", str(untrained_pair / "teacher"), tokenizer)
        assert not caplog.records
        tokenizer("one hundred and twenty-three")
        assert "longer than the specified maximum" in caplog.text  # it would have been seen
    finally:
        told.removeHandler(caplog.handler)


@pytest.fixture
def full(untrained_pair, tmp_path):
    """The student without a spare row."""
    model = AutoModelForCausalLM.from_pretrained(untrained_pair / "student")
    model.resize_token_embeddings(model.config.vocab_size - RESERVED_ROWS)
    save_model(model, load_tokenizer(untrained_pair / "student"), tmp_path / "full")
    return tmp_path / "full"


def test_a_student_without_a_row_to_spare_gets_its_router_and_its_rows_when_it_is_served(
    recipe, full, tmp_path
):
    assert train([recipe, f"student.pretrained={full}"]) == 0
    student = tmp_path / "out" / "student"
    assert AutoModelForCausalLM.from_pretrained(student).config.vocab_size == 300  # stock servers accept it
    router = RouterCheckpoint.load(tmp_path / "out" / "router")
    assert (router.reserved.start, router.reserved.count) == (300, RESERVED_ROWS)
    router.merge(student, tmp_path / "merged")
    matrix = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").get_output_embeddings().weight
    assert torch.equal(matrix[301:], router.taps)


def test_an_untrained_student_without_a_row_to_spare_keeps_its_router(recipe, full, tmp_path):
    assert train([recipe, f"student={{pretrained: {full}}}"]) == 0
    RouterCheckpoint.load(tmp_path / "out" / "router").check_student(full)


def test_a_student_that_can_get_no_rows_is_refused(recipe, full, capsys):
    save_file({"lm_head.weight_scale": torch.ones(1)}, full / "scales.safetensors")
    assert train([recipe, f"student.pretrained={full}"]) == 2
    assert f"student {full}: the output matrix of {full} is quantised" in capsys.readouterr().err


def test_no_model_writes_rows_without_a_token(untrained_pair, tmp_path):
    """Both models prefer eight rows between the tokenizer's ids and the reserved rows."""
    tokenizer = load_tokenizer(untrained_pair / "student")
    for role in ("teacher", "student"):
        model = AutoModelForCausalLM.from_pretrained(untrained_pair / role)
        model.resize_token_embeddings(300 + 8 + RESERVED_ROWS)
        model.tie_weights()
        save_model(model, tokenizer, tmp_path / role)
    pair = FrozenPair(tmp_path / "teacher", tmp_path / "student", tokenizer, 2, 1, 8).load()
    for model in (pair.student, pair.teacher):
        model.get_output_embeddings().register_forward_hook(padded_rows_win)
    assert (pair.visible, reserved_rows(pair.student, tokenizer).start) == (300, 308)
    (completion,) = pair.write([Request([5, 6], price=0.5, fraction=0.5)])
    assert max(completion.tokens) < 300
    assert max(complete(pair.student, [[5, 6]], pair.visible, 1, 8, temperature=0)[0]) < 300


def padded_rows_win(head, inputs, logits):
    logits = logits.clone()
    logits[..., 300:308] += 1000
    return logits


def test_a_template_and_its_variables_go_with_the_student(recipe, untrained_pair, tmp_path):
    bare = tmp_path / "bare"
    tokenizer = load_tokenizer(untrained_pair / "student")
    tokenizer.chat_template = None
    for role in ("teacher", "student"):
        save_model(AutoModelForCausalLM.from_pretrained(untrained_pair / role), tokenizer, bare / role)
    pair = [f"teacher.pretrained={bare}/teacher", f"student={{pretrained: {bare}/student}}"]
    only = ["--stage", "student"]
    assert train([recipe, *pair, *only]) == 2
    template = "{% if loud %}LOUD {% endif %}{{ messages[0].content }}"
    assert train([recipe, *pair, f"chat.template='{template}'", "chat.options.loud=true", *only]) == 0
    exported = load_tokenizer(tmp_path / "out" / "student")
    chat = [{"role": "user", "content": "At 2:30 pm."}]
    assert exported.apply_chat_template(chat, tokenize=False) == "LOUD At 2:30 pm."


def test_a_dry_run_prints_its_plan_and_writes_nothing(recipe, tmp_path, capsys):
    assert train([recipe, "--dry-run", "--stage", "student"]) == 0
    told = capsys.readouterr().out
    assert "28,704, trained 3,584" in told
    assert "reserved rows 300 to 331" in told
    assert "for 6 steps" in told
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml"}


def test_a_batch_that_cannot_be_split_evenly_is_refused(recipe, capsys):
    assert train([recipe, "student.schedule.accumulate=3"]) == 2
    assert "student.schedule.batch 2 does not split evenly" in capsys.readouterr().err


def test_a_router_needs_its_teacher_in_process(recipe, capsys):
    assert train([recipe, "teacher={url: 'http://127.0.0.1:9'}"]) == 2
    assert "not behind a URL" in capsys.readouterr().err


def test_methods_that_need_the_teacher_in_process_are_refused_with_a_url(recipe, capsys):
    served = ["teacher={url: 'http://127.0.0.1:9'}", "student.method={type: seqkd}", "--stage", "student"]
    assert train([recipe, *served]) == 2
    assert "student.method seqkd needs the teacher in process" in capsys.readouterr().err


def test_completions_come_from_the_server_that_a_recipe_names(recipe, tmp_path, monkeypatch, capsys):
    asked = []

    def answer(request):
        body = json.loads(request.content or b"{}")
        asked.append(request.url.path)
        if request.url.path == "/collective_rpc":
            directory = Path(body["kwargs"]["weights_path"])
            assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
                f.name for f in directory.iterdir()
            }
        prompts = body.get("prompt", [])
        choices = [{"index": i, "token_ids": [40, 41, 1]} for i in range(len(prompts))]
        return httpx.Response(200, json={"data": [{"id": "s"}], "choices": choices, "success": True})

    client = httpx.Client(transport=httpx.MockTransport(answer))
    monkeypatch.setattr(httpx, "Client", lambda timeout: client)
    own = ["student.method.on_policy=1.0", "student.rollouts={url: http://there}"]
    assert train([recipe, *own, "--stage", "student"]) == 0
    assert asked == ["/v1/models"] + 6 * ["/collective_rpc", "/reset_prefix_cache", "/v1/completions"]
    assert f"VLLM_SERVER_DEV_MODE=1 vllm serve {tmp_path}/work/student/rollouts" in capsys.readouterr().out
