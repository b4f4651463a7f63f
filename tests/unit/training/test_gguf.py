"""`wheels import`: GGUF files become Hugging Face directories."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from transformers import AutoModelForCausalLM, AutoTokenizer

import wheels
from training.gguf import ImportFailed, import_model, main

ROWS, HIDDEN, HEADS, FEED_FORWARD = 8, 8, 2, 16
WORDS = ["<unk>", "<s>", "</s>", "a", "b", "c", "ab", "\u0120a"]


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A GGUF file with a Llama of one layer, whose weights are small whole numbers."""
    file = tmp_path / "tiny.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(ROWS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * 5)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (ROWS, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.ffn_gate.weight": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_up.weight": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, FEED_FORWARD),
    }
    for part in ("q", "k", "v", "output"):
        shapes[f"blk.0.attn_{part}.weight"] = (HIDDEN, HIDDEN)
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.integers(-2, 3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_file_becomes_a_directory_that_transformers_loads(gguf_file: Path, tmp_path: Path):
    import_model(str(gguf_file), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    embedding = torch.tensor(rng.integers(-2, 3, (ROWS, HIDDEN)).astype(np.float32))
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert model.config.tie_word_embeddings
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer("ab", add_special_tokens=False).input_ids == [WORDS.index("ab")]
    assert model.generation_config.eos_token_id == 2
    assert tokenizer.chat_template is not None


def test_a_wheel_that_contains_a_gguf_file_is_accepted(gguf_file: Path, tmp_path: Path):
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, "tiny/tiny.gguf")
    assert main([str(wheel), str(tmp_path / "model")]) == 0
    assert (tmp_path / "model" / "config.json").is_file()


@pytest.mark.parametrize(
    ("content", "message"), [(b"no model at all", "not a GGUF file"), (b"GGUF broken", "cannot read")]
)
def test_a_file_without_a_model_is_refused_in_one_line(content, message, tmp_path: Path, capsys):
    (tmp_path / "wrong.gguf").write_bytes(content)
    assert wheels.main(["import", str(tmp_path / "wrong.gguf"), str(tmp_path / "model")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_a_directory_that_exists_is_left_alone(gguf_file: Path, tmp_path: Path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ImportFailed, match="exists already"):
        import_model(str(gguf_file), tmp_path / "model")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ImportFailed, match="no such file: nowhere"):
        import_model("nowhere.gguf", tmp_path / "model")
