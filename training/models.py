"""Models: a small Llama from scratch, any Hugging Face causal LM from a directory, and logits where they
matter.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from router.reserved import RESERVED_ROWS, ReservedRows
from training.batches import Batch
from training.config import Shape


def new_model(shape: Shape, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Freshly initialised, with the reserved rows behind the tokenizer's ids."""
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer) + RESERVED_ROWS,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.feed_forward,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def load_model(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """A directory that stock vLLM serves."""
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def reserved_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ReservedRows:
    """Raises ValueError where the vocabulary has no row to spare."""
    return ReservedRows.at_end(model.config.vocab_size, len(tokenizer))


def parameters(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())


def answer_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Last hidden states (after the final norm) at the positions that predict the answers: (N, H)."""
    return model.get_decoder()(input_ids=batch.ids, use_cache=False).last_hidden_state[batch.answer]


def answer_logits(model: PreTrainedModel, batch: Batch, visible: int) -> Tensor:
    """Logits (N, visible) there, over the tokenizer's ids only: the reserved rows belong to the router."""
    return model.get_output_embeddings()(answer_states(model, batch))[:, :visible]
