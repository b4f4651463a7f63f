"""A tiny model without a spare vocabulary row, and LoRA adapters for it, as PEFT writes them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

HIDDEN, HEADS, HEAD_SIZE, FEED_FORWARD, LAYERS = 64, 2, 32, 96, 2
RANK = 4
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, FEED_FORWARD),
    "mlp.down_proj": (FEED_FORWARD, HIDDEN),
}
"""(inputs, outputs) of each adapted matrix in a layer, by name."""


def save_base(directory: Path, tokenizer_of: Path) -> int:
    """Save a random model with one row for each token of a tokenizer; returns the number of rows."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    rows = len(tokenizer)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_SIZE,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    for weights in model.parameters():  # with larger weights it does not repeat one token for ever
        weights.data.mul_(4 if weights.ndim == 2 else 1)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return rows


def save_adapter(directory: Path, rows: int, seed: int) -> Path:
    """Save a random adapter of all kinds of matrices, the input and the output matrix included."""
    random = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random) * 0.1

    tensors = {}
    for layer in range(LAYERS):
        for name, (inputs, outputs) in LINEAR.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = values(RANK, inputs)
            tensors[f"{prefix}.lora_B.weight"] = values(outputs, RANK)
    tensors["base_model.model.lm_head.lora_A.weight"] = values(RANK, HIDDEN)
    tensors["base_model.model.lm_head.lora_B.weight"] = values(rows, RANK)
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = values(RANK, rows)
    tensors["base_model.model.model.embed_tokens.lora_embedding_B"] = values(HIDDEN, RANK)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    names = [name.rpartition(".")[2] for name in LINEAR]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": [*names, "lm_head", "embed_tokens"],
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory
