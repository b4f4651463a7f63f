"""The heavy teacher writes the same text as the teacher."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from server.bench.heavy import Deepening, HeavyError, deepen, lengthen, parameters


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    for p in model.parameters():
        p.data.mul_(4 if p.ndim == 2 else 1)  # so that layers matter
    model.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def logits(checkpoint: Path) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32").eval()(ids).logits


def test_a_deepened_model_has_the_logits_of_its_source(source: Path, tmp_path: Path) -> None:
    count = deepen(source, tmp_path / "heavy", Deepening(layers=5, feed_forward=96))
    config = json.loads((tmp_path / "heavy" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (5, 96)
    assert count == parameters(tmp_path / "heavy") > 2 * parameters(source)
    torch.testing.assert_close(logits(tmp_path / "heavy"), logits(source), rtol=1e-5, atol=1e-5)


def test_a_lengthened_model_is_its_source_with_more_room(source: Path, tmp_path: Path) -> None:
    lengthen(source, tmp_path / "long", 80_000)
    assert json.loads((tmp_path / "long" / "config.json").read_text())["max_position_embeddings"] == 80_000
    torch.testing.assert_close(logits(tmp_path / "long"), logits(source))


def test_the_further_layers_of_a_deepened_model_compute(source: Path, tmp_path: Path) -> None:
    """Only the two projections back are zeros. Whole layers of zeros could be skipped by a clever kernel."""
    deepen(source, tmp_path / "heavy", Deepening(layers=3, feed_forward=96))
    model = LlamaForCausalLM.from_pretrained(tmp_path / "heavy")
    zero = {n for n, p in model.named_parameters() if "layers.2." in n and not p.any()}
    assert zero == {"model.layers.2.self_attn.o_proj.weight", "model.layers.2.mlp.down_proj.weight"}


def test_a_smaller_shape_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(HeavyError, match="2 layers of 48 already"):
        deepen(source, tmp_path / "heavy", Deepening(layers=1, feed_forward=96))


def test_another_architecture_is_refused(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text()) | {"model_type": "gpt2"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeavyError, match="not a Llama"):
        deepen(source, tmp_path / "heavy")
