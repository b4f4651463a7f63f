"""A student that begins as its teacher with fewer layers: the kept layers, and the student's outputs."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    Qwen3Config,
    SmolLM3Config,
)

from router.checkpoint import RouterCheckpoint
from tests.helpers.commands import train
from tests.helpers.numbers import tokenizer_of_numbers
from tests.helpers.recipes import SCHEDULE, write_recipe
from training.config import RecipeError
from training.model_config import Shape
from training.models import new_model, save_model
from training.parallel import blocks_of
from training.pruning import kept_layers, pruned
from training.reading import check_readout, check_steps

torch.set_num_threads(1)
LAYERS = 5
SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
GROUPED = SIZES | {"intermediate_size": 48, "num_key_value_heads": 1}
GEMMA = GROUPED | {"head_dim": 16, "sliding_window": 4, "tie_word_embeddings": True}
FULL, SLIDING = "full_attention", "sliding_attention"
MIXED = [FULL, SLIDING, FULL, SLIDING, SLIDING]
FAMILIES = {
    "falcon": FalconConfig(**SIZES),
    "gemma2": Gemma2Config(**GEMMA, layer_types=MIXED, query_pre_attn_scalar=16),
    "gemma3": Gemma3TextConfig(**GEMMA, layer_types=MIXED, query_pre_attn_scalar=16),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=LAYERS, n_head=2, n_positions=64),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=48),
    "llama": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "llama, untied": LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
    "phi": PhiConfig(**SIZES, intermediate_size=48),
    "qwen3": Qwen3Config(**GROUPED, head_dim=16, tie_word_embeddings=True),
    "smollm3": SmolLM3Config(**GROUPED, no_rope_layers=[1, 0, 1, 1, 0], pad_token_id=0),
}


def saved(config, directory):
    torch.manual_seed(1)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # all of them differ between layers, norms and biases too
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize(
    ("layers", "kept", "which"),
    [(30, 3, [0, 14, 29]), (30, 2, [0, 29]), (30, 1, [0]), (5, 3, [0, 2, 4]), (4, 4, [0, 1, 2, 3])],
)
def test_the_first_and_the_last_layer_are_kept_and_others_evenly_between_them(layers, kept, which):
    assert kept_layers(layers, kept) == which


def lets_through(_block, inputs, output):
    return (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_computes_what_its_teacher_does_without_the_other_layers(family, tmp_path):
    """The teacher's own layers 1 and 3 let their inputs through."""
    teacher = saved(FAMILIES[family], tmp_path / "teacher")
    student = pruned(tmp_path / "teacher", 3).eval()
    blocks = blocks_of(teacher)
    for i in (1, 3):
        blocks[i].register_forward_hook(lets_through)
    ids = torch.arange(1, 11)[None]
    mine = student(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(mine, teacher(input_ids=ids, use_cache=False).logits)
    student.save_pretrained(tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    torch.testing.assert_close(again(input_ids=ids, use_cache=False).logits, mine)
    check_steps(student, "student")
    check_readout(student, "student")


def test_a_list_that_is_not_about_layers_stays_as_it_is(tmp_path):
    """The list has as many end tokens as the teacher has layers."""
    teacher = saved(LlamaConfig(**GROUPED), tmp_path)
    teacher.config.eos_token_id = list(range(LAYERS))
    teacher.config.save_pretrained(tmp_path)
    assert pruned(tmp_path, 2).config.eos_token_id == list(range(LAYERS))


def test_a_teacher_with_layers_of_several_kinds_is_refused_if_they_would_not_fit(tmp_path):
    """The first three of five layers are dense, so the last kept layer would have to be dense too."""
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8}
    heads = {"qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
    sizes = SIZES | {"intermediate_size": 48, "moe_intermediate_size": 16, "first_k_dense_replace": 3}
    saved(DeepseekV3Config(**sizes, **experts, **ranks, **heads), tmp_path)
    with pytest.raises(RecipeError, match=r"DeepseekV3ForCausalLM .* \"model\.layers\.2\.mlp\."):
        pruned(tmp_path, 3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A directory with a teacher of four layers that has no spare row."""
    directory = tmp_path_factory.mktemp("ready")
    tokenizer = tokenizer_of_numbers()
    model = new_model(Shape(hidden=32, layers=4, heads=1, feed_forward=32), tokenizer, 0)
    model.resize_token_embeddings(len(tokenizer))
    save_model(model, tokenizer, directory)
    return directory


SFT = {"method": {"type": "sft"}, "schedule": SCHEDULE | {"steps": 4}}
SUPERVISED = {"prune": {"layers": 2}} | SFT


@pytest.fixture
def recipe(teacher, tmp_path):
    return write_recipe(
        tmp_path,
        teacher,
        teacher={"pretrained": str(teacher)} | SFT,
        student=SUPERVISED | {"method": {"type": "kd"}},
    )


def test_a_pair_is_made_of_one_model(recipe, tmp_path):
    """The student begins as the trained teacher. The router gets its rows as with any student."""
    assert train([recipe]) == 0
    teacher = load_file(tmp_path / "out" / "teacher" / "model.safetensors")
    student = load_file(tmp_path / "out" / "student" / "model.safetensors")
    assert student.keys() == {name for name in teacher if "layers.2" not in name and "layers.3" not in name}
    router = RouterCheckpoint.load(tmp_path / "out" / "router")
    assert router.reserved.start == 300
    router.check_student(tmp_path / "out" / "student")


def test_a_student_begins_as_the_trained_teacher(recipe, tmp_path):
    """With a learning rate of almost 0 it keeps the teacher's weights."""
    still = ["student.schedule.learning_rate=1e-30", "student.schedule.optimizer=adamw"]
    for stage in ("teacher", "student"):
        assert train([recipe, *still, "--stage", stage]) == 0
    teacher = load_file(tmp_path / "out" / "teacher" / "model.safetensors")
    student = load_file(tmp_path / "out" / "student" / "model.safetensors")
    assert torch.equal(
        student["model.layers.1.mlp.up_proj.weight"], teacher["model.layers.3.mlp.up_proj.weight"]
    )
    assert torch.equal(student["model.embed_tokens.weight"], teacher["model.embed_tokens.weight"])


def test_a_dry_run_knows_the_student_before_its_teacher_is_trained(recipe, tmp_path, capsys):
    assert train([recipe, "--dry-run", "--stage", "student"]) == 0
    # 300 rows of 32; 2 layers of 4 * 32 * 32 + 3 * 32 * 32 + 2 * 32; the last norm
    assert f"{300 * 32 + 2 * (7 * 1024 + 64) + 32:,}, trained" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml"}


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["student.prune.layers=5"], "student.prune.layers 5: the teacher has 4 layers"),
        (["student.prune.layers=0"], "student.prune.layers: Input should be greater than 0"),
        (["teacher={url: 'http://127.0.0.1:9'}"], "student.prune: the layers of a teacher behind a URL"),
        (["student={prune: {layers: 2}}"], "student.method: Field required"),
        (["--stage", "student"], "no teacher in"),
        (["--stage", "student", f"student={SUPERVISED}"], "no teacher in"),
    ],
)
def test_a_model_that_cannot_be_pruned_is_refused(recipe, overrides, problem, capsys):
    assert train([recipe, *overrides]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert problem in line


def test_a_student_of_a_retrained_teacher_is_not_taken_for_the_old_one(recipe, capsys):
    """This holds even if the student's method does not ask the teacher."""
    supervised = [recipe, f"student={SUPERVISED}", "--stage", "student"]
    assert train([recipe, "--stage", "teacher"]) == 0
    assert train(supervised) == 0
    longer = "teacher.schedule.steps=5"
    assert train([recipe, "--stage", "teacher", longer, "--restart"]) == 0
    assert train([*supervised, longer]) == 2
    assert "student: the recipe has changed" in capsys.readouterr().err
